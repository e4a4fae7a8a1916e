"""``mmtrain data get`` and ``mmtrain data digest``: public tables, and what a table holds.

``mmtrain data``: fetch, prepare and look at datasets, index shards. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmtrain.cli import prepare as data_prepare
from mmtrain.cli.describe import describe_command
from mmtrain.cli.options import Force, Out, Workers
from mmtrain.cli.prepare import prepare_m5_command, prepare_panel_command
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from mmtrain.data.download.fetch import Fetched
    from mmtrain.data.download.registry import Dataset


def get_command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="What to fetch, such as etth1 weather (see --list).")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", "--out", help="Where to put them (default: MMTRAIN_DATA, else data).")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what can be fetched, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only check what is there, without a network.")] = False,
    from_file: Annotated[
        Path | None, typer.Option(help="Take this file, fetched by other means (one name only).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is there.")] = False,
) -> None:
    """Fetch public forecasting tables and check them; what is there already is only checked."""
    from mmtrain.data.download.fetch import data_root as find_root
    from mmtrain.data.download.fetch import get_dataset, verify_dataset
    from mmtrain.data.download.registry import DATASETS, find_dataset

    if list_:
        _show(list(DATASETS.values()))
        return
    if not names:
        raise UserError(f"name what to fetch: {', '.join(DATASETS)} (mmtrain data get --list)")
    if from_file is not None and (len(names) > 1 or verify):
        raise UserError("--from-file goes with one name, and not with --verify")
    root = find_root(data_root)
    faults = []
    for dataset in [find_dataset(name) for name in names]:
        try:
            if verify:
                _tell(verify_dataset(dataset, root), dataset)
            else:
                told = _Ticker(dataset.name)
                _tell(get_dataset(dataset, root, force=force, from_file=from_file, told=told), dataset)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def digest_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="CSV or parquet files.")],
) -> None:
    """The digest of a table's columns, stamps and float32 values: the same for CSV and parquet."""
    from mmtrain.data.download.check import read_content

    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        typer.echo(f"{read_content(file).digest}  {file}")


class _Ticker:
    """Bytes so far, on a terminal only."""

    def __init__(self, name: str) -> None:
        self.name, self.shown = name, 0

    def __call__(self, done: int, length: int | None) -> None:
        if not sys.stderr.isatty() or abs(done - self.shown) < 1 << 18:
            return
        self.shown = done
        of = f" of {length / 1e6:.1f}" if length else ""
        print(f"\r{self.name}: {done / 1e6:.1f}{of} MB", end="\r", file=sys.stderr, flush=True)


def _tell(got: Fetched, dataset: Dataset) -> None:
    content = got.checked.content
    origin = f"from {got.origin}" if got.origin else "was there already"
    typer.echo(f"{got.path}: {content.rows} rows, {len(content.columns)} columns; {origin}")
    typer.echo(f"  checked: {got.checked.how}")
    kept = "as the first time" if got.known else f"kept in {got.path.name}.sha256 to compare with later"
    typer.echo(f"  SHA-256 {got.checked.sha256} ({kept})")
    typer.echo(f"  licence: {dataset.licence}; {dataset.citation}")
    if dataset.note:
        typer.echo(f"  note: {dataset.note}")


def _show(datasets: list[Dataset]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "file", "rows", "columns", "from", "to", "step", "checked by", "licence", "address")
    for dataset in datasets:
        sure = "digest" if dataset.digest else "shape"
        if all(source.sha256 for source in dataset.sources):
            sure = "SHA-256"
        step = f"{dataset.step // 86400} d" if dataset.step >= 86400 else f"{dataset.step // 60} min"
        figures = (str(dataset.rows), str(len(dataset.columns)), dataset.first[:10], dataset.last[:10], step, sure)
        table.add_row(dataset.name, dataset.stem, *figures, dataset.licence, dataset.sources[0].url)
    width = None if sys.stdout.isatty() else 320  # a pipe has no width: lines must not be cut
    Console(width=width).print(table, highlight=False)


app = typer.Typer(name="data", help="Fetch, prepare and look at datasets; index shards.", no_args_is_help=True)
prepare = typer.Typer(name="prepare", help="Make a dataset that training can read.", no_args_is_help=True)
app.add_typer(prepare)
data_prepare.add_commands(prepare)
app.command("get")(get_command)
app.command("digest")(digest_command)


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
    from mmtrain.data.prepare.demo import prepare_digits

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
    from mmtrain.data.prepare.ffcv import prepare_beton

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
    from mmtrain.data.prepare.demo import prepare_traffic

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

    from mmtrain.data.core.order import Order, mixing_figure
    from mmtrain.data.images.cache import default_cache
    from mmtrain.data.images.shards import find_shards
    from mmtrain.data.images.tar_index import index_shards, write_index

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
