"""The first pass over long tables: which series there are, how many rows, and when they begin, end and step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.arrow import batches, schema_of
from mmtrain.data.timeline import Steps
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from mmtrain.data.prepare.panel_files import Columns

Int64s = NDArray[np.int64]


@dataclass
class Scan:
    """What the first pass learns, by number of series: rows, first and last time (µs)."""

    numbers: dict[str, int] = field(default_factory=dict)
    rows: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    low: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    high: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    last: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    steps: Steps = field(default_factory=Steps)

    def grow(self) -> None:
        """Room for all numbers given out."""
        more = len(self.numbers) - len(self.rows)
        if more <= 0:
            return
        more = max(more, len(self.rows))
        big = np.iinfo(np.int64).max
        for name, value in (("rows", 0), ("low", big), ("high", -big), ("last", -big)):
            setattr(self, name, np.concatenate([getattr(self, name), np.full(more, value, np.int64)]))

    def add(self, numbers: Int64s, stamps: Int64s | None) -> None:
        self.grow()
        np.add.at(self.rows, numbers, 1)
        if stamps is None:
            return
        order = np.argsort(numbers, kind="stable")
        who, when = numbers[order], stamps[order]
        first = np.concatenate([[True], who[1:] != who[:-1]])
        before = np.where(first, self.last[who], np.concatenate([[0], when[:-1]]))
        known = before > -np.iinfo(np.int64).max
        self.steps.add((when - before)[known])
        end = np.concatenate([first[1:], [True]])
        self.last[who[end]] = when[end]
        self.steps.see(stamps)
        np.minimum.at(self.low, numbers, stamps)
        np.maximum.at(self.high, numbers, stamps)

    def close(self) -> None:
        count = len(self.numbers)
        self.rows, self.low, self.high = self.rows[:count], self.low[:count], self.high[:count]


def scan_files(files: list[Path], columns: Columns) -> Scan:
    """The first pass over ``files``.

    Raises:
        UserError: for files without rows, columns that some file lacks, or times that are none.
    """
    scan = Scan()
    for file in files:
        names = [name for name in (columns.id, columns.time) if name is not None]
        wanted = names or (columns.targets or [])[:1]
        _check_columns(file, [*wanted, *(columns.targets or []), *columns.known, *columns.static])
        for batch in batches(file, wanted, names):
            scan.add(series_numbers(batch, file, columns, scan.numbers), row_stamps(batch, file, columns))
    scan.close()
    if not len(scan.rows):
        raise UserError(f"{files[0].parent if len(files) > 1 else files[0]}: there are no rows")
    return scan


def _check_columns(file: Path, names: list[str]) -> None:
    there = schema_of(file).names
    lacking = [name for name in names if name not in there]
    if lacking:
        raise UserError(f"{file}: columns {', '.join(lacking)} are missing, which the first file has")


def series_numbers(batch: pa.RecordBatch, file: Path, columns: Columns, known: dict[str, int]) -> Int64s:
    """The number of the series of each row; new ids get the next one."""
    if columns.id is None:
        return np.full(batch.num_rows, known.setdefault(file.stem, len(known)), dtype=np.int64)
    encoded = batch.column(columns.id).dictionary_encode()
    if encoded.null_count:
        raise UserError(f"{file}: the id column {columns.id!r} is empty in {encoded.null_count} row(s)")
    numbers = [known.setdefault(str(name), len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def row_stamps(batch: pa.RecordBatch, file: Path, columns: Columns) -> Int64s | None:
    """Times in µs, or None where there are none."""
    import pandas as pd
    import pyarrow as pa

    if columns.time is None:
        return None
    column = batch.column(columns.time)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        raise UserError(
            f"{file}: the time column {columns.time!r} holds numbers, not dates: correct it, or give --time none to "
            "take the rows as they come"
        )
    text = column.to_pandas()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    offsets = is_text and len(text) > 0 and _has_offset(str(text.iloc[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a format that is not one of the usual
        stamps = pd.to_datetime(text, errors="coerce", utc=offsets)
    if stamps.isna().any():
        value = text[stamps.isna()].iloc[0]
        raise UserError(f"{file}: time column {columns.time!r}: {value!r} is no date: correct it, or give --time none")
    if getattr(stamps.dt, "tz", None) is not None:
        stamps = stamps.dt.tz_convert("UTC").dt.tz_localize(None)
    return stamps.to_numpy().astype("datetime64[us]").astype(np.int64)


def _has_offset(text: str) -> bool:
    text = text.strip()
    return text.endswith("Z") or "+" in text[10:] or "-" in text[10:]
