"""Find table files, detect their format, and read them into pandas.

All readers of CSV files use the format that :mod:`mmtrain.data.series.dialect` detects.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import psutil

from mmtrain.data.series.dialect import UNNAMED, Dialect, examine
from mmtrain.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from mmtrain.config.data import SeriesDataConfig

SUFFIXES = (".csv", ".parquet", ".zip")
#: Compressed CSV files by suffix; pandas recognises the same ones.
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DUPLICATES = ("error", "keep_first", "keep_last", "mean", "keep_all")


@dataclass(frozen=True)
class TableFormat:
    """How a table is written, and how its repeated times are handled.

    Attributes:
        separator: field separator of a CSV; None detects it.
        decimal: decimal mark of a CSV; None detects it.
        time_format: dmy, mdy or ymd; strptime codes; or s, ms, us or ns for numbers since 1970. None detects it.
        duplicates: one of ``DUPLICATES``; None means "error".
    """

    separator: str | None = None
    decimal: str | None = None
    time_format: str | None = None
    duplicates: str | None = None

    @classmethod
    def of(cls, data: SeriesDataConfig) -> TableFormat:
        """Return the format that a configuration sets."""
        return cls(data.separator, data.decimal, data.time_format, data.duplicates)

    def but(self, other: TableFormat | None) -> TableFormat:
        """Return a copy that takes all values of ``other`` that are not None."""
        given = {} if other is None else {key: value for key, value in vars(other).items() if value is not None}
        return replace(self, **given)


def find_table(name: str | Path, data_root: str | Path | None = None) -> Path:
    """Return the path of a table.

    Args:
        name: a path, or a name like ``ETTh1`` or ``ETTh1.csv`` in ``data_root`` or one folder below it.
        data_root: default: the environment variable MMTRAIN_DATA.

    Raises:
        UserError: if there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    root_text = data_root or os.environ.get("MMTRAIN_DATA")
    if not root_text:
        raise UserError(
            f"{name}: no such file (looked for {Path.cwd() / path}); give the path of a {', '.join(SUFFIXES)} file, "
            "or set data.root (or the environment variable MMTRAIN_DATA) to use names like ETTh1"
        )
    root = Path(root_text).expanduser()
    names = [path.as_posix()] if path.suffix.lower() in SUFFIXES else [f"{path.as_posix()}{s}" for s in SUFFIXES]
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())] if root.is_dir() else []
    for folder in folders:
        for file in names:
            if not path.is_absolute() and (folder / file).is_file():
                return folder / file
    there = {file.stem for folder in folders for file in folder.iterdir() if file.suffix.lower() in SUFFIXES}
    raise UserError(
        f"{name}: no such file (looked for {Path.cwd() / path}, and for {' or '.join(names)} in {root} and its "
        f"subfolders){nearest(Path(name).stem, sorted(there))}"
        + ("" if root.is_dir() else f"; the data root {root} does not exist: set data.root or MMTRAIN_DATA")
    )


def read_frame(path: Path, form: TableFormat | None = None) -> pd.DataFrame:
    """Read a table into pandas. Times in the index of a parquet file become a column.

    Args:
        path: a CSV, also compressed; a ``.zip`` with exactly one CSV; or a parquet file.

    Raises:
        UserError: if the file is not such a table, has no rows, or its format is ambiguous.
    """
    form = form or TableFormat()
    try:
        if path.suffix.lower() == ".parquet":
            frame = _read_parquet(path)
        elif path.suffix.lower() == ".zip":
            stream = io.BytesIO(_unzip(path))
            frame = _read_csv(stream, examine(stream, str(path), form.separator, form.decimal))
        else:
            frame = _read_csv(path, dialect_of(path, form))
    except UserError:
        raise
    except (OSError, ValueError, Warning) as error:  # pandas' and arrow's parser errors are ValueErrors
        raise UserError(f"{path}: cannot be read as a table ({error})") from error
    if frame.empty:
        raise UserError(f"{path}: the table has no rows")
    return frame


def dialect_of(path: Path, form: TableFormat | None = None) -> Dialect:
    """Return the format of the CSV ``path``. The result is cached until the file changes."""
    form = form or TableFormat()
    try:
        found = path.stat()
        return _examined(path, found.st_mtime_ns, found.st_size, form.separator, form.decimal)
    except (OSError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from error


@lru_cache(maxsize=256)
def _examined(path: Path, changed: int, size: int, separator: str | None, decimal: str | None) -> Dialect:
    del changed, size  # only keys of the cache
    with _PACKED.get(path.suffix.lower(), open)(path, "rb") as stream:
        return examine(cast(BinaryIO, stream), str(path), separator, decimal)


def _read_csv(source: Path | BinaryIO, dialect: Dialect) -> pd.DataFrame:
    """Read a CSV of the given format; empty columns without a name are dropped."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would truncate rows longer than the header
        frame = pd.read_csv(
            source,
            sep=dialect.separator,
            decimal=dialect.decimal,
            encoding=dialect.encoding,
            index_col=False,
            names=list(dialect.names),
            header=0,
            low_memory=False,
        )
    return frame.drop(columns=[name for name in frame.columns if name.startswith(UNNAMED) and frame[name].isna().all()])


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read a parquet file; times in its index become the first column."""
    import pandas as pd

    frame = pd.read_parquet(path)
    frame.columns = [str(column) for column in frame.columns]
    for level in reversed(range(frame.index.nlevels)):
        values = frame.index.get_level_values(level)
        if pd.api.types.is_datetime64_any_dtype(values):
            name = str(values.name) if values.name is not None else "date"
            if name not in frame.columns:
                frame.insert(0, name, pd.Series(values, index=frame.index))
    return frame.reset_index(drop=True)


def _unzip(path: Path) -> bytes:
    """Return the content of the only file in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if not member.endswith("/")]
            if len(members) != 1:
                raise UserError(f"{path}: the archive contains {len(members)} files, but must contain exactly one CSV")
            size = archive.getinfo(members[0]).file_size  # zipfile never reads more than this
            if size > (room := psutil.virtual_memory().available):
                raise UserError(
                    f"{path}: unpacks to {size / 1e9:.1f} GB, but only {room / 1e9:.1f} GB of memory are free; unpack "
                    "it and save it as parquet"
                )
            return archive.read(members[0])
    except NotImplementedError as error:
        cause = f"{error}: compress it with the standard method of zip (deflate)"
    except RuntimeError:  # zipfile raises it here only for encrypted files
        cause = "it is encrypted: unpack it with its password first"
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        cause = f"{error}: the archive is damaged"
    raise UserError(f"{path}: cannot be read as a table ({cause})")


def listed(names: Iterable[str]) -> str:
    """Join the first 20 names with commas; add the total number if there are more."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f", ... ({len(shown)})" if len(shown) > 20 else "")


def place(file: Path, row: int) -> str:
    """Describe a row for a message: its number from 0 without the header, and for a CSV its line in the file."""
    return f"row {row}" + ("" if file.suffix.lower() == ".parquet" else f" (line {row + 2} of the file)")
