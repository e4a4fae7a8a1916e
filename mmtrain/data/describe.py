"""What is in a table, faults included: for looking at a series before training on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtrain.data.table import find_table, find_time_column, read_frame


@dataclass(frozen=True)
class ColumnReport:
    name: str
    kind: str  # "number", or what it holds instead
    holes: int
    low: float | None
    mean: float | None
    high: float | None


@dataclass(frozen=True)
class TableReport:
    path: Path
    rows: int
    time_column: str | None
    first: str
    last: str
    step: str
    duplicates: int
    irregular: int
    unreadable: int  # stamps that are no dates
    columns: list[ColumnReport]


def describe_table(path: str | Path, data_root: str | Path | None = None) -> TableReport:
    """Rows, time step, repeated and irregular stamps, and for each column holes, minimum, mean, maximum."""
    import pandas as pd

    from mmtrain.data.table import regularity

    file = find_table(path, data_root)
    frame = read_frame(file)
    time_name = find_time_column(frame, file, None)
    first = last = step = ""
    duplicates = irregular = unreadable = 0
    if time_name is not None:
        stamps = pd.to_datetime(frame[time_name], errors="coerce", utc=True).dt.tz_localize(None)
        unreadable = int(stamps.isna().sum())
        known = stamps.dropna()
        if len(known):
            duplicates, irregular, usual = regularity(known.to_numpy())
            first, last, step = str(known.iloc[0]), str(known.iloc[-1]), str(usual) if usual is not None else ""
    columns = [_column(frame[name]) for name in frame.columns if name != time_name]
    return TableReport(file, len(frame), time_name, first, last, step, duplicates, irregular, unreadable, columns)


def _column(column) -> ColumnReport:  # type: ignore[no-untyped-def]  # pandas is imported where it is needed
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(column):
        return ColumnReport(str(column.name), "text", int(column.isna().sum()), None, None, None)
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    good = values[np.isfinite(values)]
    figures = (float(good.min()), float(good.mean()), float(good.max())) if len(good) else (None, None, None)
    return ColumnReport(str(column.name), "number", len(values) - len(good), *figures)
