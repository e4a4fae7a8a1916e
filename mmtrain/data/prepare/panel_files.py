"""The layouts in which a panel may come, told apart by their columns: long, wide, and a file for each series."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.arrow import batches, numbers_of, schema_of, table_files
from mmtrain.data.prepare.panel_writer import Layout, Series
from mmtrain.data.series.table import TIME_NAMES, read_table
from mmtrain.data.series.timeline import Step, Timeline, step_of
from mmtrain.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ID_NAMES", "Columns", "layout_of", "numbers_of", "open_source"]

ID_NAMES = ("id", "unique_id", "series_id", "item_id")
_WIDE_ROWS = 512
logger = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Columns:
    """What the columns of a panel's files are. ``time`` None: rows as they come; ``targets`` None: all the others."""

    id: str | None = None
    time: str | None = "date"
    targets: list[str] | None = None
    known: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)


def layout_of(root: Path, chosen: Columns) -> tuple[str, Columns]:
    """ "long", "wide" or "files", and the columns by name.

    Raises:
        UserError: for columns that are not there, or files that are no panel.
    """
    file = table_files(root)[0]
    names = schema_of(file).names
    for flag, wanted in (("--known", chosen.known), ("--static", chosen.static), ("--columns", chosen.targets or [])):
        for name in wanted:
            _there(file, flag, name, names)
    if chosen.id is not None:
        _there(file, "--id", chosen.id, names)
    if chosen.time not in (None, "date"):
        _there(file, "--time", chosen.time, names)
    lowered = {name.strip().lower(): name for name in reversed(names)}
    ids = chosen.id or next((lowered[name] for name in ID_NAMES if name in lowered), None)
    time = chosen.time
    if time is not None and time not in names:
        time = next((lowered[name] for name in TIME_NAMES if name in lowered), None)
    if ids is None and not root.is_dir():
        raise UserError(
            f"{file}: no id column ({', '.join(ID_NAMES)}), so this is the table of one series: train on it with "
            "data.kind=series, or name the column that tells series apart with --id"
        )
    kind = "files" if ids is None else "wide" if time is None and chosen.time is not None else "long"
    if kind == "files" and time is None and chosen.time is not None:
        raise UserError(f"{file}: no time column ({', '.join(TIME_NAMES)}): name it with --time, or give --time none")
    used = {ids, time, *chosen.known, *chosen.static}
    targets = chosen.targets or _numeric(file, [name for name in names if name not in used])
    if not targets:
        raise UserError(f"{file}: no column is left to forecast; its columns are {', '.join(names[:20])}")
    if len({*targets, *chosen.known, *chosen.static}) < len(targets) + len(chosen.known) + len(chosen.static):
        raise UserError(f"{file}: --columns, --known and --static name a column twice")
    return kind, replace(chosen, id=ids, time=time, targets=targets)


def _there(file: Path, flag: str, name: str, names: list[str]) -> None:
    if name not in names:
        shown = ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")
        raise UserError(f"{file}: {flag} {name}: there is no such column{nearest(name, names)}; it has {shown}")


def _numeric(file: Path, names: list[str]) -> list[str]:
    """Those of the columns that hold numbers; the others are left out, which is said."""
    schema = schema_of(file)
    text = [name for name in names if not _is_number(schema.field(name).type)]
    if text:
        logger.warning("%s: %s hold no numbers and are left out (use them with --static)", file, ", ".join(text))
    return [name for name in names if name not in text]


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def open_source(
    root: Path,
    chosen: Columns,
    part: Path,
    *,
    calendar: str | Path | None = None,
    start: str | None = None,
    step: str | None = None,
    duplicates: str = "error",
) -> tuple[Layout, Iterator[Series]]:
    """What the files in ``root`` are, and their series as a stream; temporary files go to ``part``."""
    from mmtrain.data.prepare.panel_long import open_long

    kind, columns = layout_of(root, chosen)
    files = table_files(root)
    given = None if step is None else Step.parse(step)
    if kind == "wide":
        layout, series = _open_wide(files, columns, start, given)
    else:
        if start is not None:
            raise UserError("--start is for a wide panel, one column a step; here the times come from the files")
        layout, series = open_long(files, columns, part, given, duplicates)
    if calendar is not None:
        layout = _with_calendar(layout, calendar)
    return layout, series


def _open_wide(
    files: list[Path], columns: Columns, start: str | None, step: Step | None
) -> tuple[Layout, Iterator[Series]]:
    steps = columns.targets or []
    if columns.known:
        raise UserError(
            "--known is for long tables and files of series: a wide panel has one value a step (--calendar)"
        )
    layout = Layout(["value"], (), columns.static, timeline=_wide_timeline(files[0], steps, start, step))

    def series() -> Iterator[Series]:
        names = [str(columns.id), *columns.static, *steps]
        nothing = np.empty((len(steps), 0), np.float32)
        for file in files:
            numeric = {f.name for f in schema_of(file) if f.name in columns.static and _is_number(f.type)}
            text = {str(columns.id), *columns.static} - numeric
            for batch in batches(file, names, text, _WIDE_ROWS):
                values = numbers_of(batch, steps, file)[:, :, None]
                ids = [str(name) for name in batch.column(str(columns.id)).to_pylist()]
                static = zip(*(batch.column(name).to_pylist() for name in columns.static), strict=True)
                per_row = list(static) if columns.static else [()] * batch.num_rows
                for name, row, about in zip(ids, values, per_row, strict=True):
                    yield Series(name, row, nothing, 0, about)

    return layout, series()


def _wide_timeline(file: Path, steps: list[str], start: str | None, step: Step | None) -> Timeline | None:
    if start is not None and step is not None:
        return Timeline(parse_time(start, "--start"), step)
    stamps = _dates(steps)
    if start is not None or (step is not None and stamps is None):
        raise UserError("--start and --step go together: the time of the first column, and how far the next is")
    if stamps is None:
        logger.info("%s: its columns are not named by dates: no times, unless --start and --step say them", file)
        return None
    usual = step or step_of(stamps)
    timeline = None if usual is None else Timeline(stamps[0], usual)
    if timeline is not None:
        places, on = timeline.places(stamps)
        if on.all() and (places == np.arange(len(places))).all():
            return timeline
    raise UserError(f"{file}: the columns {steps[0]} to {steps[-1]} are dates without an even step: add those missing")


def _dates(names: list[str]) -> NDArray[np.datetime64] | None:
    import pandas as pd

    if any(name.strip().isdigit() for name in names):
        return None  # 1, 2, 3: numbers of steps, and no years
    made = pd.to_datetime(pd.Series(names), errors="coerce", format="ISO8601")
    return None if made.isna().any() else made.to_numpy().astype("datetime64[us]")


def parse_time(text: str, flag: str) -> np.datetime64:
    try:
        return np.datetime64(text.strip().replace(" ", "T"), "us")
    except ValueError:
        raise UserError(f"{flag} {text}: not a time, such as 2011-01-29 or 2011-01-29T06:00") from None


def _with_calendar(layout: Layout, calendar: str | Path) -> Layout:
    table = read_table(calendar)
    if layout.timeline is None or table.stamps is None:
        raise UserError(f"--calendar {calendar}: needs a time column, and a panel with times")
    places, on = layout.timeline.places(table.stamps)
    if not on.all():
        raise UserError(f"--calendar {calendar}: {table.stamps[np.argmin(on)]} is not on the grid of the data's times")
    kept = places >= 0
    count = int(places.max()) + 1 if kept.any() else 0
    shared = np.full((1, count, len(table.columns)), np.nan, dtype=np.float32)
    shared[0, places[kept]] = table.values[kept]
    holes = np.flatnonzero(~np.isfinite(shared).all(axis=(0, 2)))
    if len(holes) or not count:
        lacking = layout.timeline.stamps(int(holes[0]) if len(holes) else 0, 1)[0]
        raise UserError(f"--calendar {calendar}: it does not have {lacking}, which the data has: add that row")
    return replace(layout, shared_columns=table.columns, shared=shared)
