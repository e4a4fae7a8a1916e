"""``mmtrain data``: download, prepare, index and describe data sets."""

from mmtrain.cli.common import lazy_app

app = lazy_app(
    "data",
    """Download, prepare, index and describe data sets.

    \b
    Examples:
      mmtrain data get etth1                                        # download a public table
      mmtrain data prepare images --root photos --out data/photos   # image folders to shards
      mmtrain data index 'data/photos/train/*.tar'                  # index shards
      mmtrain data describe my_series.csv --plot my_series.png      # columns, time step, ranges
    """,
    {
        "get": ("mmtrain.cli.data.download:get_command", "Download public forecasting tables and verify them."),
        "digest": ("mmtrain.cli.data.download:digest_command", "Print the digest of a table's content."),
        "prepare": ("mmtrain.cli.data:prepare", "Convert a data set into a format that training reads."),
        "index": ("mmtrain.cli.data.images:index_command", "Rebuild the indexes of tar shards, with checksums."),
        "describe": ("mmtrain.cli.data.describe:describe_command", "Describe the content of a table or a panel."),
    },
)
prepare = lazy_app(
    "prepare",
    """Convert a data set into a format that training reads.

    \b
    Examples:
      mmtrain data prepare images --root photos --out data/photos
      mmtrain data prepare imagenet --root ILSVRC2012 --out data/imagenet
      mmtrain data prepare ffcv --root data/imagenet --out data/imagenet_ffcv
      mmtrain data prepare panel --root sales.csv --out data/sales
    """,
    {
        "images": ("mmtrain.cli.data.images:images_command", "Pack folders of images, one per class, into tar shards."),
        "imagenet": ("mmtrain.cli.data.images:imagenet_command", "Pack ImageNet (ILSVRC 2012) into tar shards."),
        "segmentation": ("mmtrain.cli.data.images:segmentation_command", "Pack images and masks into tar shards."),
        "coco": ("mmtrain.cli.data.images:coco_command", "Pack images with COCO annotations into tar shards."),
        "digits": ("mmtrain.cli.data.images:digits_command", "Pack scikit-learn's hand-written digits into shards."),
        "ffcv": ("mmtrain.cli.data.images:ffcv_command", "Convert tar shards to FFCV files."),
        "traffic": ("mmtrain.cli.data.series:traffic_command", "Write the demo's table of hourly road traffic."),
        "panel": ("mmtrain.cli.data.series:panel_command", "Convert tables of many series to a panel."),
        "m5": ("mmtrain.cli.data.series:m5_command", "Convert M5 (daily sales of 30,490 products) to a panel."),
    },
)
