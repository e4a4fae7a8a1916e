"""Summarise a table or a panel before training: statistics, faults in the data, and a plot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.files import TableFormat, find_table, read_frame
from mmtrain.data.series.order import regularity
from mmtrain.data.series.panel import Panel
from mmtrain.data.series.split import SplitRule, guess_split
from mmtrain.data.series.table import find_time_column, read_table
from mmtrain.data.series.times import find_reading, shown
from mmtrain.errors import UserError
from mmtrain.plotting.series import Line, draw_series

_MOST = 8  # maximum number of series in a plot


@dataclass(frozen=True)
class ColumnReport:
    """Statistics of one column of a table."""

    name: str
    kind: str  # "number" or "text"
    holes: int  # missing values
    low: float | None  # minimum; None without any finite number
    mean: float | None
    high: float | None  # maximum


@dataclass(frozen=True)
class TableReport:
    """Summary of a table. Without times, texts about them are empty and counts are 0."""

    path: Path
    rows: int
    time_column: str | None
    first: str  # time of the first row
    last: str  # time of the last row
    step: str  # the most common time step
    duplicates: int  # rows whose time also occurs in an earlier row
    irregular: int  # time steps that differ from ``step``
    unreadable: int  # cells of the time column that are not dates
    columns: list[ColumnReport]
    backward: int = 0  # rows with an earlier time than the row before them
    note: str = ""  # the reason why the time column is not used


def describe_table(
    path: str | Path,
    data_root: str | Path | None = None,
    form: TableFormat | None = None,
    time_column: str | None = None,
) -> TableReport:
    """Return the size, the time axis and its faults, and statistics of each column of a table.

    Args:
        path, data_root: see :func:`~mmtrain.data.series.files.find_table`.
        form: how the file is written; None detects it.
        time_column: see :func:`~mmtrain.data.series.table.find_time_column`.

    Raises:
        UserError: if the table cannot be found or read.
    """
    form = form or TableFormat()
    file = find_table(path, data_root)
    frame = read_frame(file, form)
    time_name = find_time_column(frame, file, time_column)
    columns = [_column(frame[name]) for name in frame.columns if name != time_name]
    if time_name is None:
        return TableReport(file, len(frame), None, "", "", "", 0, 0, 0, columns)
    reading = find_reading(frame[time_name], f"{file}: time column {time_name!r}", form.time_format)
    if reading is None:
        note = "it contains numbers, not dates, and is ignored"
        return TableReport(file, len(frame), time_name, "", "", "", 0, 0, 0, columns, note=note)
    stamps = reading.stamps(frame[time_name])
    known = stamps[~np.isnat(stamps)]
    even = regularity(known, reading.zone)
    first, last = (str(shown(known, reading.zone)[row]) for row in (0, -1)) if len(known) else ("", "")
    return TableReport(
        file,
        len(frame),
        time_name,
        first,
        last,
        "" if even.step is None else str(even.step),
        even.duplicates,
        even.irregular,
        len(stamps) - len(known),
        columns,
        even.backward,
    )


def _column(column) -> ColumnReport:  # type: ignore[no-untyped-def]  # pandas is imported only inside functions
    """Return the statistics of a column (pandas.Series)."""
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(column):
        return ColumnReport(str(column.name), "text", int(column.isna().sum()), None, None, None)
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    good = values[np.isfinite(values)]
    figures = (float(good.min()), float(good.mean()), float(good.max())) if len(good) else (None, None, None)
    return ColumnReport(str(column.name), "number", len(values) - len(good), *figures)


def draw_table(path: Path, report: TableReport, rule: SplitRule | None = None, form: TableFormat | None = None) -> None:
    """Plot the numeric columns of a table one above the other, with the borders of its splits.

    Args:
        path: image file to write.
        rule: the split to show; None: the split that the benchmarks use for a table of this name.
        form: how the file is written; None detects it.

    Raises:
        UserError: if no column is numeric.
    """
    form = form or TableFormat()
    numeric = [column.name for column in report.columns if column.kind == "number"]
    if not numeric:
        raise UserError(f"{report.path}: there is no numeric column to plot")
    table = read_table(
        report.path,
        columns=numeric,
        missing="mask",
        time_column=report.time_column,
        form=replace(form, duplicates="keep_all"),
    )
    rule = rule or guess_split(report.path.stem)
    borders = rule.cut_table(len(table.values), table.stamps, report.path, table.zone).borders
    shown = numeric[:_MOST]
    few = f"the first {len(shown)} of {len(numeric)} columns; " if len(shown) < len(numeric) else ""
    lines = [Line(name, table.values[:, i], table.stamps, borders) for i, name in enumerate(shown)]
    draw_series(path, f"{report.path.name}: {few}{rule}", lines)


@dataclass(frozen=True)
class SeriesReport:
    """Statistics of one example series of a panel."""

    number: int
    id: str
    why: str  # the reason it was chosen, such as "longest"; empty for series spread over the panel
    rows: int
    holes: int  # missing values of all columns
    low: float  # minimum of the first column, missing values ignored
    mean: float
    high: float


@dataclass(frozen=True)
class PanelReport:
    """Summary of a panel.

    Attributes:
        times: text with the first time, the last time and the time step; None for a panel without times.
        holes: (S,) number of missing values of each series.
        constant: (S,) whether no column of the series changes.
        examples: statistics of some series.
    """

    path: Path
    times: str | None
    holes: NDArray[np.int64]
    constant: NDArray[np.bool_]
    examples: list[SeriesReport]


def describe_panel(panel: Panel, path: Path | None = None) -> PanelReport:
    """Return a summary of a panel, reading all of it once, one chunk at a time.

    Args:
        path: the path to report; None: the folder of the panel.
    """
    holes, constant = _holes(panel)
    times = None
    if (line := panel.timeline) is not None:
        ends = int(panel.first.min()), int((panel.first + panel.lengths).max()) - 1
        first, last = (
            shown(line.stamps(position, 1), panel.zone)[0].isoformat(timespec="seconds") for position in ends
        )
        times = f"{first} to {last}, step {line.step}"
    return PanelReport(path or panel.folder, times, holes, constant, _examples(panel, holes))


def draw_panel(path: Path, panel: Panel, report: PanelReport, rule: SplitRule | None = None) -> None:
    """Plot the first column of the example series of a panel, with the borders of their splits.

    Args:
        path: image file to write.
        rule: the split to show; None: the split that the panel was prepared with.
    """
    rule = rule or SplitRule.from_json(panel.meta["split"])
    borders = rule.cut_panel(panel.lengths, panel.first, panel.timeline, panel.zone)
    lines = []
    for one in report.examples[:_MOST]:
        train, val, test = borders[one.number].tolist()
        title = f"{one.id} · {panel.columns[0]}" + (f" ({one.why})" if one.why else "")
        values, stamps = panel.series(one.number)[:, 0], panel.stamps(one.number, 0, one.rows)
        lines.append(Line(title, values, stamps, (train, val, test)))
    draw_series(path, f"{report.path.name}: {len(lines)} of {len(panel)} series; {rule}", lines)


def _holes(panel: Panel) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return for each series (S,) the number of missing values, and whether none of its columns changes."""
    holes, constant = np.zeros(len(panel), np.int64), np.zeros(len(panel), bool)
    for piece in panel.chunks():
        lengths = panel.lengths[piece]
        values = panel.heads(panel.values, piece, lengths)
        begins = np.cumsum(lengths) - lengths
        bad = ~np.isfinite(values)
        holes[piece] = np.add.reduceat(bad.sum(axis=1), begins)
        low = np.minimum.reduceat(np.where(bad, np.inf, values), begins, axis=0)
        high = np.maximum.reduceat(np.where(bad, -np.inf, values), begins, axis=0)
        constant[piece] = (low >= high).all(axis=1)
    return holes, constant


def _examples(panel: Panel, holes: NDArray[np.int64]) -> list[SeriesReport]:
    """Return statistics of the first, shortest and longest series, the one with the most missing values, and others.

    The others are spread evenly over the panel.
    """
    chosen = {0: "first", int(np.argmin(panel.lengths)): "shortest", int(np.argmax(panel.lengths)): "longest"}
    if holes.any():
        chosen[int(np.argmax(holes))] = "most missing values"
    for number in np.linspace(0, len(panel) - 1, 5).astype(int).tolist():
        chosen.setdefault(number, "")
    reports = []
    for number, why in sorted(chosen.items()):
        values = panel.series(number)[:, 0]
        good = values[np.isfinite(values)].astype(np.float64)
        figures = (float(good.min()), float(good.mean()), float(good.max())) if len(good) else (np.nan,) * 3
        rows = int(panel.lengths[number])
        reports.append(SeriesReport(number, str(panel.ids[number]), why, rows, int(holes[number]), *figures))
    return reports
