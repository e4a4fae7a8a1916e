"""``mmtrain data get`` and ``mmtrain data digest``: download public tables, and print the digest of a table."""

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
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Tables to download, such as etth1 weather (see --list)."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", "--out", help="Folder to write to (default: MMTRAIN_DATA, else data).")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the available tables and exit.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only verify existing files; needs no network.")] = False,
    from_file: Annotated[
        Path | None, typer.Option(help="Use this file, downloaded in another way (for one name only).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Download files again that already exist.")] = False,
) -> None:
    """Download public forecasting tables and verify them. Files that already exist are only verified.

    \b
    Examples:
      mmtrain data get --list
      mmtrain data get etth1 weather
      mmtrain data get etth1 --from-file ETTh1.csv
    """
    if list_:
        _list(list(DATASETS.values()))
        return
    if not names:
        raise UserError(f"name at least one table: {', '.join(DATASETS)} (see mmtrain data get --list)")
    if from_file is not None and (len(names) > 1 or verify):
        raise UserError("--from-file: needs exactly one name of a data set, and cannot be combined with --verify")
    root = find_data_root(data_root)
    errors = []
    for dataset in [find_dataset(name) for name in names]:
        try:
            if verify:
                _report(verify_dataset(dataset, root), dataset)
            else:
                progress = _Progress(dataset.name)
                _report(get_dataset(dataset, root, force=force, from_file=from_file, progress=progress), dataset)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))


def digest_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="CSV or parquet files.")],
) -> None:
    """Print the digest of a table's column names, times and float32 values. It is the same for CSV and parquet.

    \b
    Examples:
      mmtrain data digest ETTh1.csv ETTh1.parquet
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        typer.echo(f"{read_content(file).digest}  {file}")


class _Progress:
    """Print the number of bytes downloaded so far, on a terminal only."""

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
    origin = f"from {got.origin}" if got.origin else "already exists"
    typer.echo(f"{got.path}: {content.rows} rows, {len(content.columns)} columns; {origin}")
    typer.echo(f"  verified: {got.checked.how}")
    kept = "unchanged" if got.known else f"written to {got.path.name}.sha256 for later comparison"
    typer.echo(f"  SHA-256 {got.checked.sha256} ({kept})")
    typer.echo(f"  licence: {dataset.licence}; {dataset.citation}")
    if dataset.note:
        typer.echo(f"  note: {dataset.note}")


def _list(datasets: list[Dataset]) -> None:
    table = Table("name", "file", "rows", "columns", "from", "to", "time step", "verified by", "licence", "address")
    for dataset in datasets:
        check = "digest" if dataset.digest else "shape"
        if all(source.sha256 for source in dataset.sources):
            check = "SHA-256"
        step = f"{dataset.step // 86400} d" if dataset.step >= 86400 else f"{dataset.step // 60} min"
        figures = (str(dataset.rows), str(len(dataset.columns)), dataset.first[:10], dataset.last[:10], step, check)
        table.add_row(dataset.name, dataset.stem, *figures, dataset.licence, dataset.sources[0].url)
    width = None if sys.stdout.isatty() else 320  # a pipe has no width, and its lines must not be cut
    Console(width=width).print(table, highlight=False)
