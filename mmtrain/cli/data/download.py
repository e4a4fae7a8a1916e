"""``mmtrain data get`` and ``mmtrain data digest``: public tables, and the digest of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmtrain.data.download.check import read_content
from mmtrain.data.download.fetch import Fetched, get_dataset, verify_dataset
from mmtrain.data.download.fetch import data_root as find_data_root
from mmtrain.data.download.registry import DATASETS, Dataset, find_dataset
from mmtrain.errors import UserError


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
    if list_:
        _list(list(DATASETS.values()))
        return
    if not names:
        raise UserError(f"name what to fetch: {', '.join(DATASETS)} (mmtrain data get --list)")
    if from_file is not None and (len(names) > 1 or verify):
        raise UserError("--from-file goes with one name, and not with --verify")
    root = find_data_root(data_root)
    faults = []
    for dataset in [find_dataset(name) for name in names]:
        try:
            if verify:
                _report(verify_dataset(dataset, root), dataset)
            else:
                told = _Ticker(dataset.name)
                _report(get_dataset(dataset, root, force=force, from_file=from_file, told=told), dataset)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def digest_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="CSV or parquet files.")],
) -> None:
    """The digest of a table's columns, stamps and float32 values: the same for CSV and parquet."""
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


def _report(got: Fetched, dataset: Dataset) -> None:
    content = got.checked.content
    origin = f"from {got.origin}" if got.origin else "was there already"
    typer.echo(f"{got.path}: {content.rows} rows, {len(content.columns)} columns; {origin}")
    typer.echo(f"  checked: {got.checked.how}")
    kept = "as the first time" if got.known else f"kept in {got.path.name}.sha256 to compare with later"
    typer.echo(f"  SHA-256 {got.checked.sha256} ({kept})")
    typer.echo(f"  licence: {dataset.licence}; {dataset.citation}")
    if dataset.note:
        typer.echo(f"  note: {dataset.note}")


def _list(datasets: list[Dataset]) -> None:
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
