"""``mmtrain data``: fetch, prepare and look at datasets, index shards."""

from mmtrain.cli.common import lazy_app

app = lazy_app(
    "data",
    "Fetch, prepare and look at datasets; index shards.",
    {
        "get": ("mmtrain.cli.data.download:get_command", "Fetch public forecasting tables and check them."),
        "digest": ("mmtrain.cli.data.download:digest_command", "The digest of a table: the same for CSV and parquet."),
        "prepare": ("mmtrain.cli.data:prepare", "Make a dataset that training can read."),
        "index": ("mmtrain.cli.data.images:index_command", "Make the indexes of tar shards afresh, with checksums."),
        "describe": ("mmtrain.cli.data.describe:describe_command", "What is in a table or a panel."),
    },
)
prepare = lazy_app(
    "prepare",
    "Make a dataset that training can read.",
    {
        "images": ("mmtrain.cli.data.images:images_command", "Folders of images, one per class, into tar shards."),
        "imagenet": ("mmtrain.cli.data.images:imagenet_command", "ImageNet (ILSVRC 2012) into tar shards."),
        "segmentation": ("mmtrain.cli.data.images:segmentation_command", "Images and masks into tar shards."),
        "coco": ("mmtrain.cli.data.images:coco_command", "Images with boxes in COCO's format into tar shards."),
        "digits": ("mmtrain.cli.data.images:digits_command", "The hand-written digits of scikit-learn."),
        "ffcv": ("mmtrain.cli.data.images:ffcv_command", "Tar shards into FFCV's files."),
        "traffic": ("mmtrain.cli.data.series:traffic_command", "Two years of hourly road traffic and weather."),
        "panel": ("mmtrain.cli.data.series:panel_command", "Tables of many series into memory-mapped shards."),
        "m5": ("mmtrain.cli.data.series:m5_command", "M5: daily sales of 30,490 products."),
    },
)
