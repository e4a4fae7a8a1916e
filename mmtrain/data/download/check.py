"""Whether a table is the one that the registry describes, and how sure that is.

The content of a table has a digest that does not depend on how it is stored: SHA-256 over ``mmtrain-series-1`` and a
line feed; the column names as a JSON list and a line feed; the stamps in seconds since 1970 as int64; the values row by
row as float32, both little-endian. Negative zeros count as zeros and every NaN is the same one, so a CSV and a parquet
file of the same series agree.

Tables of bare numbers under gzip become CSV files with the benchmark's column names and stamps.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.download.registry import Dataset
from mmtrain.data.series.files import read_frame
from mmtrain.data.series.order import regularity
from mmtrain.data.series.table import find_time_column, numbers_in, read_times
from mmtrain.errors import UserError, os_errors

if TYPE_CHECKING:
    import pandas as pd

_MARK = b"mmtrain-series-1\n"
_LONGEST = 1 << 20  # bytes of a line
_GROWTH = 64  # bytes for each compressed one, at most


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


@dataclass(frozen=True)
class Checked:
    path: Path
    sha256: str  # of the file
    content: Content
    how: str  # what the check rests on, for people


def check_table(path: Path, dataset: Dataset) -> Checked:
    """Compare the content of ``path`` with ``dataset``. Raises UserError with all that differs."""
    content = read_content(path)
    # the benchmark's weather.csv has lost its µ and ²: what is not ASCII is not compared
    names = [tuple(name.encode("ascii", "ignore").decode() for name in each.columns) for each in (content, dataset)]
    pairs = {
        "rows": (content.rows, dataset.rows),
        "columns": (names[0], names[1]),
        "first stamp": (content.first, dataset.first),
        "last stamp": (content.last, dataset.last),
        "step in seconds": (content.step, dataset.step),
        "irregular steps": (content.irregular, dataset.irregular),
    }
    different = [
        f"{key} {_short(found)}, not {_short(right)}" for key, (found, right) in pairs.items() if found != right
    ]
    if not different and dataset.digest is not None and content.digest != dataset.digest:
        different = [f"other values: their digest is {content.digest}, not {dataset.digest}"]
    if different:
        raise UserError(f"{path}: not the table {dataset.stem} of the benchmark: {'; '.join(different)}")
    if dataset.digest is not None:
        how = "all values and stamps are those of the official file (digest of the content)"
    else:
        how = "rows, columns, stamps and step are right; no hash of the official file is known, so its values are taken"
        how += " on trust"
    return Checked(path, file_sha256(path), content, how)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with os_errors(f"{path}: cannot be read"), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{', '.join(value[:3])}, ..., {value[-1]} ({len(value)})" if len(value) > 4 else ", ".join(value)


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
    values = numbers_in(frame, path, columns).astype(np.float32)
    dates = stamps.astype("datetime64[s]")
    even = regularity(dates)
    step = 0 if even.step is None else int(even.step.total_seconds())
    first, last = (str(dates[row]).replace("T", " ") for row in (0, -1))
    digest = canonical_digest(columns, stamps, values)
    return Content(
        path, len(frame), columns, first, last, step, even.duplicates + even.irregular + even.backward, digest
    )


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
    found = read_times(frame, path, name)
    if found is None:
        raise UserError(f"{path}: column {name!r} holds numbers, not dates")
    return found[0].astype("datetime64[s]").astype(np.int64)


def table_to_csv(source: Path, target: Path, dataset: Dataset) -> None:
    """Write ``target``: a header, then each line of ``source`` behind its stamp, its numbers as they are written there.

    Raises UserError if ``source`` is no gzip file of ``dataset.rows`` lines with a number for each column.
    """
    first = np.datetime64(dataset.first.replace(" ", "T"), "s")
    rows = 0
    try:
        with open(source, "rb") as packed, open(target, "wb") as stream:
            stream.write(",".join(("date", *dataset.columns)).encode() + b"\n")
            for line in _lines(packed, source):
                if rows == dataset.rows or line.count(b",") != len(dataset.columns) - 1:
                    raise UserError(
                        f"{source.name}, line {rows + 1}: {line[:40]!r}: wanted are {dataset.rows} lines of "
                        f"{len(dataset.columns)} numbers with commas between"
                    )
                stamp = str(first + np.timedelta64(rows * dataset.step, "s")).replace("T", " ")
                stream.write(stamp.encode() + b"," + line + b"\n")
                rows += 1
            stream.flush()
            os.fsync(stream.fileno())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source.name}: not a whole gzip file ({error})") from error
    if rows != dataset.rows:
        raise UserError(f"{source.name}: {rows} rows, not {dataset.rows}")


def _lines(packed: BinaryIO, source: Path) -> Iterator[bytes]:
    """Lines without their ends; empty ones at the end are left out."""
    room = os.fstat(packed.fileno()).st_size * _GROWTH + _LONGEST
    with gzip.open(packed) as unpacked:
        while line := unpacked.readline(_LONGEST):
            room -= len(line)
            if room < 0 or len(line) == _LONGEST:
                raise UserError(f"{source.name}: unpacks to far more than such a table holds")
            if line.strip():
                yield line.strip()
