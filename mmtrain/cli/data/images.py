"""``mmtrain data prepare`` for images, and ``mmtrain data index``.

The parameters of each ``prepare`` command have the names of the arguments of the function it calls, so that it can pass
``locals()``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mmtrain.cli.common import Force, Out, Workers
from mmtrain.data.core.order import Order, mixing_figure
from mmtrain.data.images.cache import default_cache
from mmtrain.data.images.shards import find_shards
from mmtrain.data.images.tar_index import index_shards, write_index
from mmtrain.data.prepare.demo import prepare_digits
from mmtrain.data.prepare.imagenet import prepare_imagenet
from mmtrain.data.prepare.images import prepare_images
from mmtrain.data.prepare.masks import VOID
from mmtrain.data.prepare.output import Prepared
from mmtrain.data.prepare.targets import prepare_coco, prepare_segmentation
from mmtrain.errors import UserError, os_errors

Size = Annotated[int | None, typer.Option(help="Shrink images whose shorter side exceeds this many pixels.")]
Quality = Annotated[int, typer.Option(help="Quality of re-encoded JPEG images, 1 to 100.")]
ShardSize = Annotated[int, typer.Option(help="Largest number of samples per shard.")]
Turned = Annotated[
    str | None,
    typer.Option(
        help="Orientation of the targets of photos with an EXIF rotation: upright (photo as displayed) or stored "
        "(pixels as stored). Needed if the sizes do not tell."
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out unusable samples and list them in OUT/skipped.txt.")
]


def images_command(
    root: Annotated[Path, typer.Option(help="ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.")],
    out: Out,
    image_size: Size = None,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    val_fraction: Annotated[float, typer.Option(help="Validation fraction, if there is no val folder.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Test fraction, if there are only class folders.")] = 0.1,
    force: Force = False,
) -> None:
    """Pack folders of images, one per class, into tar shards.

    \b
    Examples:
      mmtrain data prepare images --root photos --out data/photos
      mmtrain submit --config vim2_digits --local 1 data.root=data/photos data.image_size=64 model.num_classes=3
    """
    _report(prepare_images(**locals()))


def imagenet_command(
    root: Annotated[Path, typer.Option(help="Folder with train/WNID and val, or Kaggle's ILSVRC/Data/CLS-LOC.")],
    out: Out,
    image_size: Size = None,
    quality: Quality = 95,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    expect: Annotated[str, typer.Option(help="full: every image must exist; any: pack the existing images.")] = "full",
    val_labels: Annotated[
        Path | None, typer.Option(help="Classes of a flat val folder, one line per image, or Kaggle's list.")
    ] = None,
    devkit: Annotated[
        Path | None, typer.Option(help="meta.mat of the devkit, if --val-labels contains its ILSVRC ids.")
    ] = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Pack ImageNet (ILSVRC 2012) into tar shards. An interrupted call continues where it stopped.

    \b
    Examples:
      mmtrain data prepare imagenet --root ILSVRC2012 --out data/imagenet
    """
    _report(prepare_imagenet(**locals()))


def segmentation_command(
    root: Annotated[
        Path, typer.Option(help="Folder with images/train and annotations/train, or train and trainannot.")
    ],
    out: Out,
    classes: Annotated[Path | None, typer.Option(help="File with the class names, one per line.")] = None,
    ignore: Annotated[
        list[int] | None, typer.Option(help="Mask value that is not a class (default: 255); repeatable.")
    ] = None,
    zero_is_void: Annotated[
        bool, typer.Option("--zero-is-void", help="Map 0 to 255 and n to n - 1, as is usual for ADE20K.")
    ] = False,
    mask_values: Annotated[
        str | None,
        typer.Option(help="Mask values of classes 0, 1, ... if they are not the class numbers, such as 0,255."),
    ] = None,
    turned: Turned = None,
    image_size: Size = None,
    quality: Quality = 95,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Pack images and masks (one class number per pixel) into tar shards.

    \b
    Examples:
      mmtrain data prepare segmentation --root ADEChallengeData2016 --out data/ade20k --zero-is-void
    """
    _report(prepare_segmentation(**{**locals(), "ignore": ignore or [VOID]}))


def coco_command(
    images: Annotated[Path, typer.Option(help="Folder of the training images.")],
    annotations: Annotated[Path, typer.Option(help="Training annotations, such as instances_train2017.json.")],
    out: Out,
    val_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    val_annotations: Annotated[Path | None, typer.Option(help="Validation annotations.")] = None,
    turned: Turned = None,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Pack images with boxes and outlines in the COCO format into tar shards.

    \b
    Examples:
      mmtrain data prepare coco --images train2017 --annotations instances_train2017.json --out data/coco
    """
    _report(prepare_coco(**locals()))


def digits_command(
    out: Out, image_size: Annotated[int, typer.Option(help="Side length in pixels.")] = 32, force: Force = False
) -> None:
    """Pack the 1,797 scanned digits of scikit-learn into tar shards.

    \b
    Examples:
      mmtrain data prepare digits --out data/digits
    """
    _report(prepare_digits(**locals()))


def ffcv_command(
    root: Annotated[
        Path, typer.Option(help="Data set of tar shards: ROOT/train, and optionally ROOT/val and ROOT/test.")
    ],
    out: Out,
    write_mode: Annotated[
        str, typer.Option(help="Storage of images: jpg, raw (pixels), or proportion (some of each).")
    ] = "jpg",
    max_resolution: Annotated[
        int | None, typer.Option(help="Shrink images whose longer side exceeds this many pixels.")
    ] = None,
    jpeg_quality: Annotated[
        int | None,
        typer.Option(help="Re-encode all images with this quality (default: copy JPEG files that fit, others at 90)."),
    ] = None,
    compress_probability: Annotated[
        float, typer.Option(help="With --write-mode proportion: fraction stored as JPEG.")
    ] = 0.5,
    page_size: Annotated[int, typer.Option(help="Page size in MiB, a power of two; must fit the largest image.")] = 8,
    workers: Workers = None,
    force: Force = False,
) -> None:
    """Convert tar shards to FFCV files, one per split, with the same samples in the same order.

    \b
    Examples:
      mmtrain data prepare ffcv --root data/imagenet --out data/imagenet_ffcv
      mmtrain submit --config vim2_base_in1k_ffcv --nodes 4
    """
    options = locals()
    from mmtrain.data.prepare.ffcv import prepare_beton  # imports torch

    _report(prepare_beton(**options))


def _report(done: Prepared) -> None:
    """Print the numbers of samples and classes, and the number of skipped samples."""
    counts = ", ".join(f"{count} {split}" for split, count in done.meta["counts"].items())
    state = "written" if done.fresh else "already exists, nothing to do"
    classes = f"{len(done.meta['classes'])} classes" if "classes" in done.meta else "classes without names"
    typer.echo(f"{done.out}: {counts}; {classes}; {state}")
    if skipped := done.meta.get("skipped"):
        typer.echo(f"{skipped} unusable samples were left out: see {done.out / 'skipped.txt'}", err=True)


def index_command(
    shards: Annotated[
        list[str],
        typer.Argument(help="Shards, folders of shards, patterns such as shard-{000000..000009}.tar, or URLs."),
    ],
    window: Annotated[int, typer.Option(help="Value of data.shuffle_window whose mixing is printed.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Also write the indexes to this folder, to be copied next to remote shards.")
    ] = None,
) -> None:
    """Rebuild the indexes of tar shards, with checksums, so that no run has to build them.

    \b
    Examples:
      mmtrain data index data/photos/train data/photos/val
      mmtrain data index 'https://example.org/shard-{000000..000009}.tar' --out indexes
    """
    paths = find_shards(shards)
    targets = [] if out is None else [out / (str(path).rpartition("/")[2] + ".idx") for path in paths]
    if twice := [target.name for target, count in Counter(targets).items() if count > 1]:
        raise UserError(f"--out {out}: two shards would write {twice[0]}. Call the command once per split")
    if out is not None:
        with os_errors(f"--out {out}: cannot be written", "choose another folder"):
            out.mkdir(parents=True, exist_ok=True)
    found = index_shards(paths, rebuild=True, digest=True, cache=default_cache())
    samples = sum(len(index) for index in found)
    classes = len(np.unique(np.concatenate([index.labels for index in found])))
    mixing = mixing_figure(Order([len(index) for index in found], seed=0, window=window))
    typer.echo(f"{len(found)} shard(s), {samples} samples, {classes} classes: all valid")
    typer.echo(
        f"data.shuffle_window={window}: neighbours in a shard are {mixing:.3f} times as far apart in the order of"
        " training as after a full shuffle"
    )
    if out is not None:
        for target, index in zip(targets, found, strict=True):
            if fault := write_index(index, target):
                raise UserError(f"--out {out}: {target.name} cannot be written ({fault}). Choose another folder")
        typer.echo(f"{out}: {len(found)} index(es)")
