"""Read a table of one time series (CSV or parquet) as float64 values, and report faults before training starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.dialect import UNNAMED
from mmtrain.data.series.files import TableFormat, find_table, listed, place, read_frame
from mmtrain.data.series.order import arrange
from mmtrain.data.series.timeline import Step, step_of, to_local
from mmtrain.data.series.times import are_dates, find_reading
from mmtrain.errors import UserError, nearest
from mmtrain.log import logger

if TYPE_CHECKING:
    import pandas as pd

TIME_NAMES = ("date", "datetime", "timestamp", "time")
FILLS = ("ffill", "interpolate", "zero")
MISSING = ("error", *FILLS, "mask")
_COMMAS = re.compile(r"\s*[+-]?[\d.]*,\d+\s*")


@dataclass(frozen=True)
class SeriesTable:
    """A table of one time series in memory."""

    values: NDArray[np.float64]  # (T, M)
    columns: list[str]
    stamps: NDArray[np.datetime64] | None  # (T,) times; None without a time column, or if it contains numbers
    path: Path
    filled: int = 0  # number of missing values that were filled
    #: (T + ahead, K) columns known in advance, also for rows after the last target; ``stamps`` cover these rows too.
    known: NDArray[np.float64] | None = None
    holes: int = 0  # number of missing values that were kept as NaN
    zone: str | None = None  # the time zone that the file names; ``stamps`` are in UTC then

    @property
    def step(self) -> Step | None:
        """The usual time step; None without times or with fewer than two."""
        if self.stamps is None:
            return None
        return step_of(self.stamps if self.zone is None else to_local(self.stamps, self.zone))


def read_table(
    path: str | Path,
    *,
    time_column: str | None = "date",
    columns: Sequence[str] | None = None,
    missing: str = "error",
    data_root: str | Path | None = None,
    known: Sequence[str] = (),
    form: TableFormat | None = None,
) -> SeriesTable:
    """Read a CSV (also zipped) or parquet file with one row for each time step. Rows are sorted by time.

    Args:
        time_column: "date" or None: the first column named date, datetime, timestamp or time, or else the first column
            if it contains dates. "none": no time column. Any other name must exist.
        columns: columns to use, in this order; None: all except the time column and ``known``.
        missing: handling of missing values (empty, NaN, infinite): "error", "ffill" (last value before, never from the
            future), "interpolate" (linear; nearest value at the ends), "zero", or "mask" (keep as NaN).
        data_root: see :func:`~mmtrain.data.series.files.find_table`.
        known: columns known in advance, which are not targets. They may have values in rows after the last target.
            Missing values are handled as in targets, except that "mask" acts as "error".
        form: how the file is written, and how rows with the same time are handled.

    Raises:
        UserError: for any fault of the table; the message names file, column, row and cure.
    """
    if missing not in MISSING:
        raise UserError(f"data.missing={missing!r}: must be one of {', '.join(MISSING)}{nearest(missing, MISSING)}")
    form = form or TableFormat()
    file = find_table(path, data_root)
    frame = read_frame(file, form)
    time_name = find_time_column(frame, file, time_column)
    times = None if time_name is None else read_times(frame, file, time_name, form.time_format)
    stamps, zone = times if times is not None else (None, None)
    names = _columns(frame, file, time_name, columns, known)
    cure = "; correct it, or list the columns to use in data.columns=[...]"
    values, known_values = numbers_in(frame, file, names, cure), None
    if known:
        known_values = numbers_in(frame, file, known, cure)
    rows = np.arange(len(values))
    order = None if stamps is None else arrange(stamps, file, form.duplicates or "error", zone)
    if stamps is not None and order is not None:
        rows, values = order.first, order.apply(values)
        stamps, known_values = stamps[rows], None if known_values is None else order.apply(known_values)
    if known_values is not None:
        seen: NDArray[np.bool_] = np.asarray(np.isfinite(values).any(axis=1))
        values = values[: len(seen) - int(np.argmax(seen[::-1])) if seen.any() else 0].copy()
    filled = _fill(values, names, file, missing, rows)
    if known_values is not None:
        _fill(known_values, list(known), file, "error" if missing == "mask" else missing, rows)
    return SeriesTable(values, names, stamps, file, filled, known_values, int((~np.isfinite(values)).sum()), zone)


def numbers_in(frame: pd.DataFrame, file: Path, names: Sequence[str], cure: str = "") -> NDArray[np.float64]:
    """Return columns of a data frame as numbers (T, len(names)).

    Numbers too large for float32 become infinite, which counts as missing.

    Args:
        file: the table, for messages.
        cure: end of the error message.

    Raises:
        UserError: for a column that is not numeric.
    """
    import pandas as pd

    values = np.empty((len(frame), len(names)), dtype=np.float64)
    for number, name in enumerate(names):
        column = frame[name]
        if not pd.api.types.is_numeric_dtype(column):
            text = column.astype(object)
            parsed = pd.to_numeric(text.astype(str), errors="coerce")
            bad = (parsed.isna() & text.notna()).to_numpy()
            row = int(np.argmax(bad)) if bad.any() else 0
            cell = text.iloc[row]
            hint = "; if the comma is its decimal mark, set data.decimal=comma" if _COMMAS.fullmatch(str(cell)) else ""
            if are_dates(column):
                hint = f"; if it is the time column, set data.time_column={name}"
            raise UserError(f"{file}: column {name!r} is not numeric: {place(file, row)} contains {cell!r}{hint}{cure}")
        values[:, number] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        mark_too_large(values[:, number])
    return values


def mark_too_large(values: NDArray[np.float64]) -> None:
    """Replace numbers that are too large for float32 by infinity, in place."""
    values[np.abs(values) > np.finfo(np.float32).max] = np.inf


def find_time_column(frame: pd.DataFrame, file: Path, wanted: str | None) -> str | None:
    """Return the name of the time column, or None for a table without one.

    Args:
        file: the table, for messages.
        wanted: name of the column. "none": no time column. "date" or None: the first column named date, datetime,
            timestamp or time, or else the first column if it contains dates.

    Raises:
        UserError: if the column ``wanted`` does not exist.
    """
    if wanted in frame.columns:
        return wanted
    if wanted == "none":
        return None
    if wanted not in (None, "date"):
        raise UserError(
            f"{file}: there is no time column {wanted!r}{nearest(wanted, frame.columns)}; set data.time_column to one "
            f"of its columns: {listed(frame.columns)}"
        )
    named = next((name for name in frame.columns if name.strip().lower() in TIME_NAMES), None)
    if named is None and len(frame.columns) > 1 and are_dates(frame[first := str(frame.columns[0])]):
        name = "the first column (without a name)" if first.startswith(UNNAMED) else f"the first column ({first!r})"
        logger.info("%s: %s contains dates and is used as the time column (data.time_column)", file, name)
        return first
    return named


def _columns(
    frame: pd.DataFrame, file: Path, time_name: str | None, wanted: Sequence[str] | None, known: Sequence[str] = ()
) -> list[str]:
    """Return the names of the target columns; UserError for invalid ``wanted`` or ``known`` columns."""
    every = [name for name in frame.columns if name != time_name]
    for name in known:
        if name not in every or name in (wanted or ()):
            fault = "is also in data.columns" if name in every else f"is not a column{nearest(name, every)}"
            raise UserError(f"{file}: data.known: {name!r} {fault}; the columns are {listed(every)}")
    found = [name for name in every if name not in known]
    if wanted is None:
        if not found:
            raise UserError(f"{file}: there are no target columns, only the time column and data.known; add a column")
        return found
    for name in wanted:
        if name not in found:
            fault = "is the time column" if name == time_name else f"is not a column{nearest(name, found)}"
            raise UserError(f"{file}: data.columns: {name!r} {fault}; the columns are {listed(found)}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"{file}: data.columns={list(wanted)}: must name at least one column, and no column twice")
    return list(wanted)


def read_times(
    frame: pd.DataFrame, file: Path, name: str, time_format: str | None = None
) -> tuple[NDArray[np.datetime64], str | None] | None:
    """Read the times of a column.

    Returns:
        The times (T,) as datetime64[us], and their time zone or None; with a zone the times are in UTC. None if the
        column contains numbers that are not times.

    Raises:
        UserError: if a row is not a date, or if the dates are ambiguous.
    """
    column = frame[name]
    reading = find_reading(column, f"{file}: time column {name!r}", time_format)
    if reading is None:
        logger.info("%s: time column %r contains numbers, not dates, and is ignored", file, name)
        return None
    found = reading.stamps(column)
    bad = np.isnat(found)
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"{file}: time column {name!r}, {place(file, row)}: {column.iloc[row]!r} is not a date; correct it, or set "
            "data.time_column or data.time_format"
        )
    return found, reading.zone


def _fill(values: NDArray[np.float64], names: list[str], file: Path, missing: str, rows: NDArray[np.int64]) -> int:
    """Fill missing values in place and return their number. ``rows``: the row in the file of each row of ``values``."""
    holes = ~np.isfinite(values)
    if not holes.any():
        return 0
    counts = holes.sum(axis=0)
    if missing == "mask":
        values[holes] = np.nan
        return 0
    for column in np.flatnonzero(counts).tolist():
        name, bad = names[column], holes[:, column]
        first = int(np.argmax(bad))
        if missing == "error":
            raise UserError(
                f"{file}: column {name!r} has {counts[column]} missing value(s) (empty, NaN or infinite), the first in "
                f"{place(file, int(rows[first]))}; fill them, or set data.missing=ffill (or interpolate, zero, mask)"
            )
        if bad.all():
            raise UserError(f"{file}: column {name!r} contains no numbers; leave it out of data.columns=[...]")
        if not fill_column(values[:, column], bad, missing):
            raise UserError(
                f"{file}: the first value of column {name!r} is missing, so data.missing=ffill has no value to repeat; "
                "use data.missing=interpolate or zero"
            )
    logger.warning(
        "%s: filled %d missing value(s) in %d column(s) (data.missing=%s)",
        file,
        counts.sum(),
        (counts > 0).sum(),
        missing,
    )
    return int(counts.sum())


def carry(column: NDArray[np.floating], bad: NDArray[np.bool_]) -> None:
    """Fill the ``bad`` rows of ``column`` (T,) in place with the last good value before them, or else the first one."""
    first = int(np.argmin(bad))
    column[:first] = column[first]
    fill_column(column, bad & (np.arange(len(bad)) >= first), "ffill")


def fill_column(column: NDArray[np.floating], bad: NDArray[np.bool_], fill: str) -> bool:
    """Fill the ``bad`` rows of ``column`` (T,) in place; return False if ``fill`` cannot do it.

    Args:
        fill: "ffill" repeats the last good value before, and cannot fill a first row that is bad. "interpolate" is
            linear, with the nearest value at the ends. "zero" sets 0. All except "zero" need at least one good row.
    """
    rows = np.arange(len(column))
    good = rows[~bad]
    if fill == "zero":
        column[bad] = 0
    elif not len(good):
        return False
    elif fill == "interpolate":
        column[bad] = np.interp(rows[bad], good, column[good])
    elif bad[0]:
        return False
    else:
        column[bad] = column[good[np.searchsorted(good, rows[bad]) - 1]]
    return True
