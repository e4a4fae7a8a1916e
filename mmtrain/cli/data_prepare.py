"""``mmtrain data prepare`` for the public image datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmtrain.cli.options import Force, Out, Workers

if TYPE_CHECKING:
    from mmtrain.data.prepare.writer import Prepared

Size = Annotated[int | None, typer.Option(help="Shrink images whose shorter side is longer than this (pixels).")]
Quality = Annotated[int, typer.Option(help="Of the JPEGs that are made anew, 1 to 100.")]
ShardSize = Annotated[int, typer.Option(help="Samples in a shard, at most.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used: OUT/skipped.txt lists it.")]


def add_commands(prepare: typer.Typer) -> None:
    """Register the commands of this module."""
    prepare.command("imagenet")(imagenet_command)
    prepare.command("segmentation")(segmentation_command)
    prepare.command("coco")(coco_command)


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
    from mmtrain.data.prepare.imagenet import prepare_imagenet

    done = prepare_imagenet(
        root,
        out,
        image_size=image_size,
        quality=quality,
        shard_size=shard_size,
        workers=workers,
        expect=expect,
        val_labels=val_labels,
        devkit=devkit,
        skip_bad=skip_bad,
        force=force,
    )
    tell(done)


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
    image_size: Size = None,
    quality: Quality = 95,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Images and masks (a class number for each pixel) into tar shards."""
    from mmtrain.data.prepare.segmentation import VOID, prepare_segmentation

    done = prepare_segmentation(
        root,
        out,
        classes=classes,
        ignore=ignore or [VOID],
        zero_is_void=zero_is_void,
        image_size=image_size,
        quality=quality,
        shard_size=shard_size,
        workers=workers,
        skip_bad=skip_bad,
        force=force,
    )
    tell(done)


def coco_command(
    images: Annotated[Path, typer.Option(help="Folder of the training images.")],
    annotations: Annotated[Path, typer.Option(help="Their annotations, such as instances_train2017.json.")],
    out: Out,
    val_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    val_annotations: Annotated[Path | None, typer.Option(help="Their annotations.")] = None,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Images with boxes and outlines in COCO's format into tar shards."""
    from mmtrain.data.prepare.coco import prepare_coco

    done = prepare_coco(
        images,
        annotations,
        out,
        val_images=val_images,
        val_annotations=val_annotations,
        shard_size=shard_size,
        workers=workers,
        skip_bad=skip_bad,
        force=force,
    )
    tell(done)


def tell(done: Prepared) -> None:
    """What is in the dataset, in a line; and what is not."""
    counts = ", ".join(f"{count} {split}" for split, count in done.meta["counts"].items())
    state = "written" if done.fresh else "was there already, nothing to do"
    classes = f"{len(done.meta['classes'])} classes" if "classes" in done.meta else "classes without names"
    typer.echo(f"{done.out}: {counts}; {classes}; {state}")
    if skipped := done.meta.get("skipped"):
        typer.echo(f"{skipped} could not be used and were left out: {done.out / 'skipped.txt'}", err=True)
