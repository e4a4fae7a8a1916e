"""Tables of bare numbers under gzip → CSV with the benchmark's column names and stamps."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmtrain.data.get.registry import Dataset
from mmtrain.errors import UserError

_LONGEST = 1 << 20  # bytes of a line
_GROWTH = 64  # bytes for each compressed one, at most


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
