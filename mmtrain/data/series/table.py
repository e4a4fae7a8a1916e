"""A table of one time series: CSV or parquet → float64 values, with every fault named before training starts."""

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
    values: NDArray[np.float64]  # (T, M)
    columns: list[str]
    stamps: NDArray[np.datetime64] | None  # (T,) or None without a time column (or with a numeric one)
    path: Path
    filled: int = 0  # holes that were filled
    #: (T + ahead, K) of the columns that are known in advance; ``stamps`` have the rows ahead too.
    known: NDArray[np.float64] | None = None
    holes: int = 0  # holes that were kept, as NaN
    zone: str | None = None  # the time zone that the file names; ``stamps`` are in UTC then

    @property
    def step(self) -> Step | None:
        """The usual step of the times, None without one."""
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
    """Read a CSV (also zipped) or parquet file with one row for each time step.

    ``time_column``: "date" or None take the first column named date, datetime, timestamp or time, or else the first of
    all if it holds dates; "none" takes none; any other name must exist. Rows are sorted by time. ``columns``: which to
    use, in this order (None: all but the time column). ``missing``: what to do with holes (empty, NaN, infinite):
    "error", "ffill" (last value before: never looks ahead), "interpolate" (linear, nearest at the ends), "zero", or
    "mask" (they stay, as NaN). ``known``: columns known in advance, which are no targets and may have no holes; rows at
    the end in which only they are given lie ahead of the values. ``form``: how the file is written, and which of the
    rows with one time are used.
    Raises UserError naming file, column, row and cure.
    """
    if missing not in MISSING:
        raise UserError(f"data.missing={missing!r}: one of {', '.join(MISSING)}{nearest(missing, MISSING)}")
    form = form or TableFormat()
    file = find_table(path, data_root)
    frame = read_frame(file, form)
    time_name = find_time_column(frame, file, time_column)
    times = None if time_name is None else read_times(frame, file, time_name, form.time_format)
    stamps, zone = times if times is not None else (None, None)
    names = _columns(frame, file, time_name, columns, known)
    cure = "; correct it, or name the columns to use: data.columns=[...]"
    values, beside = numbers_in(frame, file, names, cure), None
    if known:
        beside = numbers_in(frame, file, known, cure)
    rows = np.arange(len(values))
    order = None if stamps is None else arrange(stamps, file, form.duplicates or "error", zone)
    if stamps is not None and order is not None:
        rows, values = order.first, order.apply(values)
        stamps, beside = stamps[rows], None if beside is None else order.apply(beside)
    if beside is not None:
        seen: NDArray[np.bool_] = np.asarray(np.isfinite(values).any(axis=1))
        values = values[: len(seen) - int(np.argmax(seen[::-1])) if seen.any() else 0].copy()
    filled = _fill(values, names, file, missing, rows)
    if beside is not None:
        _fill(beside, list(known), file, "error" if missing == "mask" else missing, rows)
    return SeriesTable(values, names, stamps, file, filled, beside, int((~np.isfinite(values)).sum()), zone)


def numbers_in(frame: pd.DataFrame, file: Path, names: Sequence[str], cure: str = "") -> NDArray[np.float64]:
    """(T, len(names)); what is too large for float32 is infinite, which counts as a hole.

    Raises UserError, which ends in ``cure``, for a column that is not numeric.
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
            held = text.iloc[row]
            hint = "; are its decimals behind a comma? Set data.decimal" if _COMMAS.fullmatch(str(held)) else ""
            if are_dates(column):
                hint = f"; it holds dates: set data.time_column={name}"
            raise UserError(f"{file}: column {name!r} is not numeric: {place(file, row)} holds {held!r}{hint}{cure}")
        values[:, number] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        mark_too_large(values[:, number])
    return values


def mark_too_large(values: NDArray[np.float64]) -> None:
    """Make infinite, in place, what is too large for float32."""
    values[np.abs(values) > np.finfo(np.float32).max] = np.inf


def find_time_column(frame: pd.DataFrame, file: Path, wanted: str | None) -> str | None:
    """The column ``wanted``, or the first with the name of one, or the first of all if its texts are dates.

    None where there is none, and for "none". Raises UserError for a ``wanted`` column that is not there.
    """
    if wanted in frame.columns:
        return wanted
    if wanted == "none":
        return None
    if wanted not in (None, "date"):
        raise UserError(
            f"{file}: no time column {wanted!r}{nearest(wanted, frame.columns)}; its columns are "
            f"{listed(frame.columns)}: set data.time_column"
        )
    named = next((name for name in frame.columns if name.strip().lower() in TIME_NAMES), None)
    if named is None and len(frame.columns) > 1 and are_dates(frame[first := str(frame.columns[0])]):
        what = "its first column, which has no name," if first.startswith(UNNAMED) else f"its first column, {first!r},"
        logger.info("%s: %s holds dates: it is the time column (data.time_column)", file, what)
        return first
    return named


def _columns(
    frame: pd.DataFrame, file: Path, time_name: str | None, wanted: Sequence[str] | None, known: Sequence[str] = ()
) -> list[str]:
    every = [name for name in frame.columns if name != time_name]
    for name in known:
        if name not in every or name in (wanted or ()):
            what = "is also in data.columns" if name in every else f"is not there{nearest(name, every)}"
            raise UserError(f"{file}: data.known: {name!r} {what}; the columns are {listed(every)}")
    found = [name for name in every if name not in known]
    if wanted is None:
        if not found:
            raise UserError(f"{file}: no columns besides the time column {time_name!r}")
        return found
    for name in wanted:
        if name not in found:
            what = "is the time column" if name == time_name else f"is not there{nearest(name, found)}"
            raise UserError(f"{file}: data.columns: {name!r} {what}; the columns are {listed(found)}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"{file}: data.columns={list(wanted)}: name at least one column, and none twice")
    return list(wanted)


def read_times(
    frame: pd.DataFrame, file: Path, name: str, time_format: str | None = None
) -> tuple[NDArray[np.datetime64], str | None] | None:
    """The times of a column (datetime64[us], in UTC where it has a zone) and their zone; None for other numbers.

    Raises UserError for rows that are no dates, and for dates that could be read in two ways.
    """
    column = frame[name]
    reading = find_reading(column, f"{file}: time column {name!r}", time_format)
    if reading is None:
        logger.info("%s: time column %r holds numbers, not dates; it is left out", file, name)
        return None
    found = reading.stamps(column)
    bad = np.isnat(found)
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"{file}: time column {name!r}, {place(file, row)}: {column.iloc[row]!r} is no date; correct it, or set "
            "data.time_column or data.time_format"
        )
    return found, reading.zone


def _fill(values: NDArray[np.float64], names: list[str], file: Path, missing: str, rows: NDArray[np.int64]) -> int:
    """Fill holes in place; the number filled. ``rows``: where each row of ``values`` stands in the file."""
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
                f"{file}: column {name!r} has {counts[column]} hole(s) (empty, NaN or infinite), the first in "
                f"{place(file, int(rows[first]))}; fill them, or set data.missing=ffill (or interpolate, zero, mask)"
            )
        if bad.all():
            raise UserError(f"{file}: column {name!r} holds no number at all: leave it out with data.columns=[...]")
        if not fill_column(values[:, column], bad, missing):
            raise UserError(
                f"{file}: column {name!r} begins with a hole, so data.missing=ffill has nothing to repeat; use "
                "data.missing=interpolate or zero"
            )
    logger.warning(
        "%s: filled %d hole(s) in %d column(s) (data.missing=%s)", file, counts.sum(), (counts > 0).sum(), missing
    )
    return int(counts.sum())


def carry(column: NDArray[np.floating], bad: NDArray[np.bool_]) -> None:
    """Fill the ``bad`` rows of ``column`` (T,) in place with the last value before, at the beginning with the first."""
    first = int(np.argmin(bad))
    column[:first] = column[first]
    fill_column(column, bad & (np.arange(len(bad)) >= first), "ffill")


def fill_column(column: NDArray[np.floating], bad: NDArray[np.bool_], fill: str) -> bool:
    """Fill the ``bad`` rows of ``column`` (T,) in place; False where the way of filling cannot.

    ``ffill`` repeats the last value before (it never looks ahead, and so cannot fill the first row), ``interpolate`` is
    linear and takes the nearest at the ends, ``zero`` is 0. All ways except ``zero`` need a row that is not bad.
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
