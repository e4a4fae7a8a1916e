"""``mmtrain data prepare`` for the public image datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmtrain.data.prepare.writer import Prepared

Out = Annotated[Path, typer.Option(help="Folder to write; it appears only when it is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Size = Annotated[int | None, typer.Option(help="Shrink images whose shorter side is longer.")]
Quality = Annotated[int, typer.Option(help="Of the JPEGs that are made anew, 1 to 100.")]
ShardSize = Annotated[int, typer.Option(help="Samples in a shard, at most.")]
Workers = Annotated[int | None, typer.Option(help="Processes (default: one per core, at most 8).")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used: OUT/skipped.txt lists it.")]


def add_commands(prepare: typer.Typer) -> None:
    """Register the commands of this module."""
    prepare.command("imagenet")(imagenet_command)


def imagenet_command(
    root: Annotated[Path, typer.Option(help="Holds train/WNID and val, or Kaggle's ILSVRC/Data/CLS-LOC.")],
    out: Out,
    image_size: Size = None,
    quality: Quality = 95,
    shard_size: ShardSize = 1000,
    workers: Workers = None,
    expect: Annotated[str, typer.Option(help="full: every image must be there; any: take what is.")] = "full",
    val_labels: Annotated[Path | None, typer.Option(help="Classes of a flat val folder, one a line.")] = None,
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


def tell(done: Prepared) -> None:
    """What is in the dataset, in a line; and what is not."""
    counts = ", ".join(f"{count} {split}" for split, count in done.meta["counts"].items())
    state = "written" if done.fresh else "was there already, nothing to do"
    typer.echo(f"{done.out}: {counts}; {len(done.meta['classes'])} classes; {state}")
    if skipped := done.meta.get("skipped"):
        typer.echo(f"{skipped} could not be used and were left out: {done.out / 'skipped.txt'}", err=True)
