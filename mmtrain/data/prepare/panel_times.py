"""The times of a panel's files: one way of reading them for all rows, found before the first row is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmtrain.data.prepare.tables import Columns, batches
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.times import Int64s, Reading, are_dates, find_reading
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def with_reading(files: list[Path], columns: Columns) -> Columns:
    """``columns`` with the way in which their times are read. Only dates that are no ISO 8601 need all rows for it.

    Raises:
        UserError: for numbers that are no times, and dates that could be read in two ways.
    """
    if columns.time is None:
        return columns
    where = f"{files[0].parent if len(files) > 1 else files[0]}: time column {columns.time!r}"
    parts = _parts(files, columns.time, columns.form)
    first = next(parts, None)
    if first is None:
        return columns
    reading = _plain(first, where, columns.form)
    if reading is None:
        import pandas as pd

        found = [first.drop_duplicates(), *(part.drop_duplicates() for part in parts)]
        reading = find_reading(pd.concat(found).drop_duplicates(), where, columns.form.time_format)
    if reading is None:
        raise UserError(
            f"{where} holds numbers, not dates: correct it, set --time-format (s, ms, us or ns for numbers since "
            "1970), or give --time none to take the rows as they come"
        )
    return replace(columns, reading=reading)


def _parts(files: list[Path], name: str, form: TableFormat) -> Iterator[pd.Series]:
    for file in files:
        for batch in batches(file, [name], [name], form=form):
            yield batch.column(name).to_pandas()


def _plain(column: pd.Series, where: str, form: TableFormat) -> Reading | None:
    """The reading of times that cannot be misread, whatever rows follow; else None."""
    import pandas as pd

    if form.time_format is not None or pd.api.types.is_datetime64_any_dtype(column):
        return find_reading(column, where, form.time_format)
    if pd.api.types.is_numeric_dtype(column) or not len(column):
        return None
    text = str(column.iloc[0])
    if len(text) < 7 or text.strip().isdigit() or text[4:5] not in "-/":
        return None
    found = find_reading(column, where)
    return found if found is not None and found.kind == "iso" else None


def row_stamps(batch: pa.RecordBatch, file: Path, columns: Columns) -> Int64s | None:
    """Times in µs, or None where there are none."""
    if columns.time is None or columns.reading is None:
        return None
    column = batch.column(columns.time).to_pandas()
    stamps = columns.reading.stamps(column)
    bad = np.isnat(stamps)
    if bad.any():
        value = column.iloc[int(np.argmax(bad))]
        raise UserError(
            f"{file}: time column {columns.time!r}: {value!r} is no date: correct it, or give --time-format, "
            "or --time none"
        )
    return stamps.astype(np.int64)


def find_dates(file: Path, ids: str | None, names: Sequence[str], form: TableFormat) -> str | None:
    """The only one of the columns ``names`` that holds dates, of a table whose series have more rows than one."""
    wanted = [*names, *([] if ids is None else [ids])]
    batch = next(iter(batches(file, wanted, wanted, form=form)), None)
    if batch is None or (ids is not None and len(batch.column(ids).unique()) == batch.num_rows):
        return None
    found = [name for name in names if are_dates(batch.column(name).to_pandas())]
    return found[0] if len(found) == 1 else None
