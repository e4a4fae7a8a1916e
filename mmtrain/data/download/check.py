"""Checking that a table has the content that the registry describes.

The digest of a table's content does not depend on the file format. It is the SHA-256 of ``mmtrain-series-1`` and a line
feed; the column names as a JSON list and a line feed; the timestamps in seconds since 1970 as int64; and the values row
by row as float32, both little-endian. Negative zero counts as zero and all NaNs count as equal, so a CSV and a parquet
file of the same series have the same digest.

Gzip files that contain only numbers are converted to CSV files with the benchmark's column names and timestamps.
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
_LONGEST = 1 << 20  # maximum length of a line, in bytes
_GROWTH = 64  # maximum compression ratio of a gzip file


@dataclass(frozen=True)
class Content:
    """The content of a table."""

    path: Path
    rows: int
    columns: tuple[str, ...]  # without the time column
    first: str  # first timestamp
    last: str  # last timestamp
    step: int  # most frequent time step, in seconds
    irregular: int  # number of time steps that differ from it
    digest: str  # of the content


@dataclass(frozen=True)
class Checked:
    """A table that passed the check."""

    path: Path
    sha256: str  # of the file
    content: Content
    how: str  # how the table was checked, for messages


def check_table(path: Path, dataset: Dataset) -> Checked:
    """Compare the content of the file ``path`` with ``dataset``.

    Raises:
        UserError: if they differ. The message lists all differences.
    """
    content = read_content(path)
    # Only ASCII characters of names are compared, because the benchmark's weather.csv has lost its µ and ².
    names = [tuple(name.encode("ascii", "ignore").decode() for name in each.columns) for each in (content, dataset)]
    pairs = {
        "rows": (content.rows, dataset.rows),
        "columns": (names[0], names[1]),
        "first timestamp": (content.first, dataset.first),
        "last timestamp": (content.last, dataset.last),
        "time step in seconds": (content.step, dataset.step),
        "number of irregular time steps": (content.irregular, dataset.irregular),
    }
    different = [
        f"{key}: found {_short(found)}, expected {_short(right)}"
        for key, (found, right) in pairs.items()
        if found != right
    ]
    if not different and dataset.digest is not None and content.digest != dataset.digest:
        different = [f"digest of the values: found {content.digest}, expected {dataset.digest}"]
    if different:
        raise UserError(
            f"{path}: differs from the table {dataset.stem} of the benchmark: {'; '.join(different)}. Download it again"
        )
    if dataset.digest is not None:
        how = "all values and timestamps are those of the official file (digest of the content)"
    else:
        how = "rows, columns, timestamps and time step are correct; the values are not checked, because no hash of the"
        how += " official file is known"
    return Checked(path, file_sha256(path), content, how)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with os_errors(f"{path}: cannot be read"), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{', '.join(value[:3])}, ..., {value[-1]} ({len(value)})" if len(value) > 4 else ", ".join(value)


def canonical_digest(columns: Sequence[str], stamps: NDArray[np.int64], values: NDArray[np.float32]) -> str:
    """Return the digest of a table's content (see the module) as 64 hexadecimal digits.

    Args:
        columns: M names.
        stamps: timestamps (T,) in seconds since 1970.
        values: values (T, M).
    """
    if values.shape != (len(stamps), len(columns)):
        raise ValueError(f"values of shape {values.shape} for {len(stamps)} timestamps and {len(columns)} columns")
    plain = values.astype("<f4") + np.float32(0)  # -0 + 0 is 0
    plain[np.isnan(plain)] = np.float32("nan")
    found = hashlib.sha256(_MARK)
    found.update(json.dumps(list(columns), ensure_ascii=True).encode() + b"\n")
    found.update(stamps.astype("<i8").tobytes())
    found.update(plain.astype("<f4").tobytes())
    return found.hexdigest()


def read_content(path: Path) -> Content:
    """Read the content of a CSV or parquet file. Raises UserError unless it is a numeric table with a time column."""
    frame = _read(path)
    time = find_time_column(frame, path, None)
    if time is None:
        raise UserError(f"{path}: no time column. Name it date, datetime, timestamp or time")
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
    """Read a table as ``read_frame`` does, but convert numbers of a CSV to the nearest float64.

    Older versions of pandas may round a number to a neighbour of the nearest float64.
    """
    if path.suffix.lower() in (".parquet", ".zip"):
        return read_frame(path)
    from pyarrow import csv

    try:
        frame = csv.read_csv(path).to_pandas()
    except (OSError, ValueError) as error:  # Arrow's exceptions are subclasses of ValueError
        raise UserError(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:200]})") from error
    if frame.empty:
        raise UserError(f"{path}: the table has no rows")
    return frame


def _seconds(frame: pd.DataFrame, path: Path, name: str) -> NDArray[np.int64]:
    found = read_times(frame, path, name)
    if found is None:
        raise UserError(f"{path}: the column {name!r} contains numbers, not dates")
    return found[0].astype("datetime64[s]").astype(np.int64)


def table_to_csv(source: Path, target: Path, dataset: Dataset) -> None:
    """Convert a gzip file of bare numbers to a CSV file with a header and timestamps. Numbers are copied as text.

    Args:
        source: gzip file.
        target: CSV file to write.
        dataset: description of the table, with its column names and timestamps.

    Raises:
        UserError: if ``source`` is not a gzip file of ``dataset.rows`` lines with a number for each column.
    """
    first = np.datetime64(dataset.first.replace(" ", "T"), "s")
    rows = 0
    try:
        with open(source, "rb") as packed, open(target, "wb") as stream:
            stream.write(",".join(("date", *dataset.columns)).encode() + b"\n")
            for line in _lines(packed, source):
                if rows == dataset.rows or line.count(b",") != len(dataset.columns) - 1:
                    raise UserError(
                        f"{source.name}, line {rows + 1}: {line[:40]!r}: the file must have {dataset.rows} lines of "
                        f"{len(dataset.columns)} numbers separated by commas"
                    )
                stamp = str(first + np.timedelta64(rows * dataset.step, "s")).replace("T", " ")
                stream.write(stamp.encode() + b"," + line + b"\n")
                rows += 1
            stream.flush()
            os.fsync(stream.fileno())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source.name}: not a complete gzip file ({error})") from error
    if rows != dataset.rows:
        raise UserError(f"{source.name}: has {rows} rows instead of {dataset.rows}; download it again")


def _lines(packed: BinaryIO, source: Path) -> Iterator[bytes]:
    """Yield the lines of a gzip file without line breaks. Empty lines are skipped."""
    room = os.fstat(packed.fileno()).st_size * _GROWTH + _LONGEST
    with gzip.open(packed) as unpacked:
        while line := unpacked.readline(_LONGEST):
            room -= len(line)
            if room < 0 or len(line) == _LONGEST:
                raise UserError(f"{source.name}: decompresses to far more data than the table has")
            if line.strip():
                yield line.strip()
