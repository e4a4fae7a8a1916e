"""What a table holds, as a digest that does not depend on how it is stored.

The digest is SHA-256 over: ``mmtrain-series-1`` and a line feed; the column names as a JSON list and a line feed; the
stamps in seconds since 1970 as int64; the values row by row as float32, both little-endian. Negative zeros count as
zeros and every NaN is the same one, so a CSV and a parquet file of the same series agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.table import find_time_column, place, read_frame, regularity
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_MARK = b"mmtrain-series-1\n"


@dataclass(frozen=True)
class Content:
    """What was found in a table."""

    path: Path
    rows: int
    columns: tuple[str, ...]  # without the time column
    first: str
    last: str
    step: int  # seconds, the usual one
    irregular: int  # steps that differ from it
    digest: str


def canonical_digest(columns: Sequence[str], stamps: NDArray[np.int64], values: NDArray[np.float32]) -> str:
    """SHA-256 (64 hex digits) of stamps (T,) in seconds and values (T, M) under M column names."""
    if values.shape != (len(stamps), len(columns)):
        raise ValueError(f"values of shape {values.shape} for {len(stamps)} stamps and {len(columns)} columns")
    plain = values.astype("<f4") + np.float32(0)  # -0 + 0 is 0
    plain[np.isnan(plain)] = np.float32("nan")
    found = hashlib.sha256(_MARK)
    found.update(json.dumps(list(columns), ensure_ascii=True).encode() + b"\n")
    found.update(stamps.astype("<i8").tobytes())
    found.update(plain.astype("<f4").tobytes())
    return found.hexdigest()


def read_content(path: Path) -> Content:
    """Read a CSV or parquet file whole. Raises UserError for what is no table of numbers with a time column."""
    frame = _read(path)
    time = find_time_column(frame, path, None)
    if time is None:
        raise UserError(f"{path}: no time column (date, datetime, timestamp or time)")
    stamps = _seconds(frame, path, time)
    columns = tuple(name for name in frame.columns if name != time)
    values = np.empty((len(frame), len(columns)), dtype=np.float32)
    for number, name in enumerate(columns):
        values[:, number] = _floats(frame, path, name)
    dates = stamps.astype("datetime64[s]")
    duplicates, irregular, usual = regularity(dates)
    step = 0 if usual is None else int(usual.total_seconds())
    first, last = (str(dates[row]).replace("T", " ") for row in (0, -1))
    digest = canonical_digest(columns, stamps, values)
    return Content(path, len(frame), columns, first, last, step, duplicates + irregular, digest)


def _read(path: Path) -> pd.DataFrame:
    """As ``read_frame``, but a number of a CSV becomes the float64 nearest to it: older pandas may be one off."""
    if path.suffix.lower() in (".parquet", ".zip"):
        return read_frame(path)
    from pyarrow import csv

    try:
        frame = csv.read_csv(path).to_pandas()
    except (OSError, ValueError) as error:  # arrow's errors are ValueErrors
        raise UserError(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:200]})") from error
    if frame.empty:
        raise UserError(f"{path}: the table holds no rows")
    return frame


def _seconds(frame: pd.DataFrame, path: Path, name: str) -> NDArray[np.int64]:
    import pandas as pd

    stamps = pd.to_datetime(frame[name], errors="coerce", utc=True)
    if stamps.isna().any():
        row = int(np.argmax(stamps.isna().to_numpy()))
        raise UserError(f"{path}: column {name!r}, {place(path, row)}: {frame[name].iloc[row]!r} is no date")
    return stamps.dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype(np.int64)


def _floats(frame: pd.DataFrame, path: Path, name: str) -> NDArray[np.float32]:
    import pandas as pd

    column = frame[name]
    if not pd.api.types.is_numeric_dtype(column):
        bad = pd.to_numeric(column.astype(str), errors="coerce").isna().to_numpy()
        row = int(np.argmax(bad))
        raise UserError(f"{path}: column {name!r} is not numeric: {place(path, row)} holds {column.iloc[row]!r}")
    with np.errstate(over="ignore"):
        return column.to_numpy(dtype=np.float64, na_value=np.nan).astype(np.float32)
