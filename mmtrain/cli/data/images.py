"""``mmtrain data prepare`` for images, and ``mmtrain data index``.

The options of ``prepare`` have the names of the arguments of the function that is called, which therefore gets
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

Size = Annotated[int | None, typer.Option(help="Shrink images whose shorter side is longer than this (pixels).")]
Quality = Annotated[int, typer.Option(help="Of the JPEGs that are made anew, 1 to 100.")]
ShardSize = Annotated[int, typer.Option(help="Samples in a shard, at most.")]
Turned = Annotated[
    str | None,
    typer.Option(
        help="Targets of photos that EXIF marks as turned were made on the photo as it is shown (upright) or on the "
        "pixels as they are stored (stored); needed where their size does not tell."
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used: OUT/skipped.txt lists it.")]


def images_command(
    root: Annotated[Path, typer.Option(help="ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.")],
    out: Out,
    image_size: Size = None,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    val_fraction: Annotated[float, typer.Option(help="Part to set aside if there is no val folder.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Part to set aside if there are only class folders.")] = 0.1,
    force: Force = False,
) -> None:
    """Folders of images, one per class, into tar shards."""
    _report(prepare_images(**locals()))


def imagenet_command(
    root: Annotated[Path, typer.Option(help="Holds train/WNID and val, or Kaggle's ILSVRC/Data/CLS-LOC.")],
    out: Out,
    image_size: Size = None,
    quality: Quality = 95,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    expect: Annotated[str, typer.Option(help="full: every image must be there; any: take what is.")] = "full",
    val_labels: Annotated[
        Path | None, typer.Option(help="Classes of a flat val folder, a line an image, or Kaggle's list.")
    ] = None,
    devkit: Annotated[
        Path | None, typer.Option(help="meta.mat of the devkit, if --val-labels holds its ILSVRC ids.")
    ] = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """ImageNet (ILSVRC 2012) into tar shards; goes on where it was interrupted."""
    _report(prepare_imagenet(**locals()))


def segmentation_command(
    root: Annotated[Path, typer.Option(help="Holds images/train and annotations/train, or train and trainannot.")],
    out: Out,
    classes: Annotated[Path | None, typer.Option(help="A file with the classes' names, one a line.")] = None,
    ignore: Annotated[
        list[int] | None, typer.Option(help="A number that is no class (default: 255); may be repeated.")
    ] = None,
    zero_is_void: Annotated[
        bool, typer.Option("--zero-is-void", help="0 becomes 255 and n becomes n - 1, as is usual for ADE20K.")
    ] = False,
    mask_values: Annotated[
        str | None,
        typer.Option(help="The values of class 0, 1, ... in the masks, where they are no class numbers: 0,255."),
    ] = None,
    turned: Turned = None,
    image_size: Size = None,
    quality: Quality = 95,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Images and masks (a class number for each pixel) into tar shards."""
    _report(prepare_segmentation(**{**locals(), "ignore": ignore or [VOID]}))


def coco_command(
    images: Annotated[Path, typer.Option(help="Folder of the training images.")],
    annotations: Annotated[Path, typer.Option(help="Their annotations, such as instances_train2017.json.")],
    out: Out,
    val_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    val_annotations: Annotated[Path | None, typer.Option(help="Their annotations.")] = None,
    turned: Turned = None,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Images with boxes and outlines in COCO's format into tar shards."""
    _report(prepare_coco(**locals()))


def digits_command(
    out: Out, image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 32, force: Force = False
) -> None:
    """The 1,797 real hand-written digits of scikit-learn."""
    _report(prepare_digits(**locals()))


def ffcv_command(
    root: Annotated[Path, typer.Option(help="A dataset of tar shards: ROOT/train, and ROOT/val and ROOT/test.")],
    out: Out,
    write_mode: Annotated[str, typer.Option(help="jpg, raw (pixels), or proportion (some of each).")] = "jpg",
    max_resolution: Annotated[
        int | None, typer.Option(help="Shrink images whose longer side is longer than this (pixels).")
    ] = None,
    jpeg_quality: Annotated[
        int | None, typer.Option(help="Encode all anew (default: keep JPEG files that fit as they are, others at 90).")
    ] = None,
    compress_probability: Annotated[float, typer.Option(help="Part to store as JPEG, for proportion.")] = 0.5,
    page_size: Annotated[int, typer.Option(help="MiB, a power of two; the largest image must fit in.")] = 8,
    workers: Workers = None,
    force: Force = False,
) -> None:
    """Tar shards into FFCV's files, one for each split: the same samples in the same order."""
    options = locals()
    from mmtrain.data.prepare.ffcv import prepare_beton  # brings torch

    _report(prepare_beton(**options))


def _report(done: Prepared) -> None:
    """What is in the dataset, in a line; and what is not."""
    counts = ", ".join(f"{count} {split}" for split, count in done.meta["counts"].items())
    state = "written" if done.fresh else "was there already, nothing to do"
    classes = f"{len(done.meta['classes'])} classes" if "classes" in done.meta else "classes without names"
    typer.echo(f"{done.out}: {counts}; {classes}; {state}")
    if skipped := done.meta.get("skipped"):
        typer.echo(f"{skipped} could not be used and were left out: {done.out / 'skipped.txt'}", err=True)


def index_command(
    shards: Annotated[
        list[str], typer.Argument(help="Shards, folders of shards, shard-{000000..000009}.tar, or addresses of them.")
    ],
    window: Annotated[int, typer.Option(help="The data.shuffle_window to show the mixing of.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Write the indexes here too: copy them beside the shards of an address.")
    ] = None,
) -> None:
    """Make the indexes of tar shards afresh, with checksums, so that no run has to."""
    paths = find_shards(shards)
    targets = [] if out is None else [out / (str(path).rpartition("/")[2] + ".idx") for path in paths]
    if twice := [target.name for target, count in Counter(targets).items() if count > 1]:
        raise UserError(f"--out {out}: two of the shards would be {twice[0]}: give a folder for each split, one by one")
    if out is not None:
        with os_errors(f"--out {out}: cannot be written", "give another folder"):
            out.mkdir(parents=True, exist_ok=True)
    found = index_shards(paths, rebuild=True, digest=True, cache=default_cache())
    samples = sum(len(index) for index in found)
    classes = len(np.unique(np.concatenate([index.labels for index in found])))
    mixing = mixing_figure(Order([len(index) for index in found], seed=0, window=window))
    typer.echo(f"{len(found)} shard(s), {samples} samples, {classes} classes: all in order")
    typer.echo(
        f"shuffled in windows of {window} shard(s) (data.shuffle_window), neighbours in a shard come {mixing:.3f} times"
        " as far apart as in a full shuffle"
    )
    if out is not None:
        for target, index in zip(targets, found, strict=True):
            if fault := write_index(index, target):
                raise UserError(f"--out {out}: {target.name} cannot be written ({fault}); give another folder")
        typer.echo(f"{out}: {len(found)} index(es)")
