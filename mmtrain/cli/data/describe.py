"""``mmtrain data describe``: describe a table or a panel, with an optional plot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from mmtrain.cli.common import Decimal, Separator, TimeFormat
from mmtrain.cli.data.series import Dates, Last, Ratios, SplitName, split_rule
from mmtrain.data.prepare.panel import ID_NAMES, prepare_panel
from mmtrain.data.prepare.tables import SUFFIXES, schema_of
from mmtrain.data.series.describe import PanelReport, describe_panel, describe_table, draw_panel, draw_table
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.panel import Panel, is_panel, open_panel
from mmtrain.data.series.split import SplitRule
from mmtrain.errors import UserError, os_errors


def describe_command(
    file: Annotated[
        str, typer.Argument(help="CSV or parquet file, name of a table in --root such as ETTh1, or folder of a panel.")
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the tables given by name (default: MMTRAIN_DATA).")
    ] = None,
    id: Annotated[str | None, typer.Option(help="Id column of a panel (default: id, unique_id, series_id...).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the series, with the splits marked, to this PNG file.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time column, or none (default: found by name, else the first column of dates).")
    ] = None,
    separator: Separator = None,
    decimal: Decimal = None,
    time_format: TimeFormat = None,
    split: SplitName = None,
    ratios: Ratios = None,
    dates: Dates = None,
    last: Last = None,
) -> None:
    """Describe the content of a table or a panel.

    For a table: columns, time step, missing values and repeated times. For a panel: series, their lengths and missing
    values. A panel is a folder written by `mmtrain data prepare panel`, or files that this command can read; these are
    first converted in a temporary folder, which also checks them.

    \b
    Examples:
      mmtrain data describe my_series.csv --plot my_series.png
      mmtrain data describe data/sales
    """
    rule, form = split_rule(split, ratios, dates, last), TableFormat(separator, decimal, time_format)
    if plot is not None and plot.suffix.lower() != ".png":
        raise UserError(f"--plot {plot}: the file name must end in .png")
    path = Path(file).expanduser()
    if path.is_dir() or id is not None or _has_ids(path, form):
        _describe_panel(path, id, plot, rule, form, time)
    else:
        _describe_table(file, root, plot, rule, form, time)


def _has_ids(path: Path, form: TableFormat) -> bool:
    if not path.is_file() or path.suffix.lower() not in SUFFIXES or not path.stat().st_size:
        return False
    return any(name.strip().lower() in ID_NAMES for name in schema_of(path, form).names)


def _describe_table(
    file: str, root: Path | None, plot: Path | None, rule: SplitRule | None, form: TableFormat, time: str | None
) -> None:
    report = describe_table(file, root, form, time)
    console = Console()
    console.print(f"{report.path}: {report.rows} rows, {len(report.columns)} columns", highlight=False)
    if report.time_column is None:
        console.print("no time column", highlight=False)
    elif report.note:
        console.print(f"{report.time_column}: {report.note}", highlight=False)
    else:
        console.print(
            f"{report.time_column}: {report.first} to {report.last}, time step {report.step}; "
            f"{report.duplicates} repeated, {report.irregular} irregular, {report.unreadable} unreadable"
            + (f", {report.backward} out of order" if report.backward else ""),
            highlight=False,
        )
    table = Table("column", "content", "missing", "min", "mean", "max")
    for column in report.columns:
        figures = ("" if value is None else f"{value:.6g}" for value in (column.low, column.mean, column.high))
        table.add_row(column.name, column.kind, str(column.holes), *figures)
    console.print(table)
    if plot is not None:
        _draw(plot, lambda: draw_table(plot, report, rule, form))


def _describe_panel(
    path: Path, id: str | None, plot: Path | None, rule: SplitRule | None, form: TableFormat, time: str | None
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if not is_panel(path):
            folder = Path(scratch) / "panel"
            given = rule or SplitRule("ratio", parts=(0.7, 0.1, 0.2))
            column = None if time == "none" else time or "date"
            prepare_panel(path, folder, split=given, id_column=id, time_column=column, duplicates="last", form=form)
        panel = open_panel(folder)
        report = describe_panel(panel, path)
        _print_panel(panel, report)
        if plot is not None:
            _draw(plot, lambda: draw_panel(plot, panel, report, rule))


def _print_panel(panel: Panel, report: PanelReport) -> None:
    console = Console()

    def write(text: str) -> None:
        console.print(text, highlight=False)

    rows, holes = panel.lengths, report.holes
    write(f"{report.path}: a panel of {len(panel)} series, {rows.sum()} rows, columns {', '.join(panel.columns)}")
    write(f"rows per series: {rows.min()} to {rows.max()}, median {np.median(rows):g}")
    write(report.times or "no times")
    write(f"{holes.sum()} values missing, in {(holes > 0).sum()} series; {report.constant.sum()} constant series")
    kinds = {name: f"{len(values)} values" for name, values in panel.categories.items()}
    static = [f"{name} ({kinds.get(name, 'number')})" for name in panel.statics]
    for kind, found in (("known in advance", [*panel.known_columns, *panel.shared_columns]), ("static", static)):
        if found:
            write(f"{kind}: {', '.join(found)}")
    table = Table("series", "", "rows", "missing", "min", "mean", "max")
    for one in report.examples:
        figures = (f"{value:.6g}" for value in (one.low, one.mean, one.high))
        table.add_row(one.id, one.why, str(one.rows), str(one.holes), *figures)
    console.print(table)


def _draw(plot: Path, draw: Callable[[], None]) -> None:
    with os_errors(f"--plot {plot}: cannot be written"):
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw()
    typer.echo(f"plot: {plot}")
