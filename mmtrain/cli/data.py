"""``mmtrain data``: fetch, prepare and look at datasets, index shards. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from mmtrain.cli import data_get, data_prepare
from mmtrain.cli.describe import describe_command
from mmtrain.cli.options import Force, Out, Workers
from mmtrain.cli.panels import prepare_m5_command, prepare_panel_command
from mmtrain.errors import UserError

app = typer.Typer(name="data", help="Fetch, prepare and look at datasets; index shards.", no_args_is_help=True)
prepare = typer.Typer(name="prepare", help="Make a dataset that training can read.", no_args_is_help=True)
app.add_typer(prepare)
data_prepare.add_commands(prepare)
app.command("get")(data_get.get_command)
app.command("digest")(data_get.digest_command)


@prepare.command("images")
def prepare_images_command(
    root: Annotated[Path, typer.Option(help="ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.")],
    out: Out,
    image_size: Annotated[
        int | None, typer.Option(help="Shrink images whose shorter side is longer than this (pixels).")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Samples in a shard, at most.")] = 1000,
    workers: Workers = None,
    val_fraction: Annotated[float, typer.Option(help="Part to set aside if there is no val folder.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Part to set aside if there are only class folders.")] = 0.1,
    force: Force = False,
) -> None:
    """Folders of images, one per class, into tar shards."""
    from mmtrain.data.prepare.images import prepare_images

    done = prepare_images(
        root,
        out,
        image_size=image_size,
        shard_size=shard_size,
        workers=workers,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        force=force,
    )
    data_prepare.tell(done)


@prepare.command("digits")
def prepare_digits_command(
    out: Out, image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 32, force: Force = False
) -> None:
    """The 1,797 real hand-written digits of scikit-learn."""
    from mmtrain.data.prepare.digits import prepare_digits

    data_prepare.tell(prepare_digits(out, image_size, force=force))


@prepare.command("ffcv")
def prepare_ffcv_command(
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
    from mmtrain.data.prepare.beton import prepare_beton

    done = prepare_beton(
        root,
        out,
        write_mode=write_mode,
        max_resolution=max_resolution,
        jpeg_quality=jpeg_quality,
        compress_probability=compress_probability,
        page_size=page_size,
        workers=workers,
        force=force,
    )
    data_prepare.tell(done)


@prepare.command("traffic")
def prepare_traffic_command(out: Out) -> None:
    """Two years of hourly road traffic and weather: OUT/traffic.csv."""
    from mmtrain.data.prepare.traffic import prepare_traffic

    report = prepare_traffic(out)
    typer.echo(
        f"{report.file}: {report.rows} hours"
        + ("" if report.fresh else " (was there already)")
        + f"; {report.holes} hours without a measurement (at most {report.longest} in a row) filled linearly"
        + "".join(f"; {name}: {count} values beyond 8 deviations, kept" for name, count in report.outliers.items())
    )


prepare.command("panel")(prepare_panel_command)
prepare.command("m5")(prepare_m5_command)


@app.command("index")
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
    import numpy as np

    from mmtrain.data.cache import default_cache
    from mmtrain.data.order import Order, mixing_figure
    from mmtrain.data.shards import find_shards
    from mmtrain.data.tarindex import index_shards, write_index

    paths = find_shards(shards)
    targets = [] if out is None else [out / (str(path).rpartition("/")[2] + ".idx") for path in paths]
    if twice := [target.name for target, count in Counter(targets).items() if count > 1]:
        raise UserError(f"--out {out}: two of the shards would be {twice[0]}: give a folder for each split, one by one")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from error
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


app.command("describe")(describe_command)
