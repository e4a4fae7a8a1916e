"""The one door for tables: finding a file, and reading it as pandas or Arrow have it.

Text is read as :mod:`mmtrain.data.series.dialect` finds that it is written, whoever reads it.
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
#: Packed CSVs, which pandas knows by their suffix too.
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DUPLICATES = ("error", "keep_first", "keep_last", "mean", "keep_all")


@dataclass(frozen=True)
class TableFormat:
    """How a table is written, and how its repeated times are taken. None finds it out, and refuses repeated times.

    ``time_format``: dmy, mdy or ymd, codes of strptime, or s, ms, us or ns for numbers since 1970. ``duplicates``: see
    ``DUPLICATES``.
    """

    separator: str | None = None
    decimal: str | None = None
    time_format: str | None = None
    duplicates: str | None = None

    @classmethod
    def of(cls, data: SeriesDataConfig) -> TableFormat:
        """That of a configuration."""
        return cls(data.separator, data.decimal, data.time_format, data.duplicates)

    def but(self, other: TableFormat | None) -> TableFormat:
        """This one with all that ``other`` says."""
        given = {} if other is None else {key: value for key, value in vars(other).items() if value is not None}
        return replace(self, **given)


def find_table(name: str | Path, data_root: str | Path | None = None) -> Path:
    """The file of a table: a path, or a name like ``ETTh1`` or ``ETTh1.csv`` in ``data_root`` or one folder below it.

    Without ``data_root`` the environment variable MMTRAIN_DATA says where to look.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    root_text = data_root or os.environ.get("MMTRAIN_DATA")
    if not root_text:
        raise UserError(
            f"{name}: no such file (looked for {Path.cwd() / path}); give the path of a {', '.join(SUFFIXES)} file, "
            "or data.root (or the environment variable MMTRAIN_DATA) for names like ETTh1"
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
        f"folders){nearest(Path(name).stem, sorted(there))}"
        + ("" if root.is_dir() else f"; the data root {root} does not exist: set data.root or MMTRAIN_DATA")
    )


def read_frame(path: Path, form: TableFormat | None = None) -> pd.DataFrame:
    """The file as pandas reads it; a ``.zip`` must hold one CSV. Times in the index of a parquet file are a column.

    Raises:
        UserError: for what is no such table, or could be read in two ways.
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
        raise UserError(f"{path}: the table holds no rows")
    return frame


def dialect_of(path: Path, form: TableFormat | None = None) -> Dialect:
    """How the CSV ``path`` is written; looked at once as long as it does not change."""
    form = form or TableFormat()
    try:
        found = path.stat()
        return _examined(path, found.st_mtime_ns, found.st_size, form.separator, form.decimal)
    except (OSError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from error


@lru_cache(maxsize=256)
def _examined(path: Path, changed: int, size: int, separator: str | None, decimal: str | None) -> Dialect:
    del changed, size  # they are there to be compared
    with _PACKED.get(path.suffix.lower(), open)(path, "rb") as stream:
        return examine(cast(BinaryIO, stream), str(path), separator, decimal)


def _read_csv(source: Path | BinaryIO, dialect: Dialect) -> pd.DataFrame:
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header, which would be cut
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
    """The one file in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if not member.endswith("/")]
            if len(members) != 1:
                raise UserError(f"{path}: a zip of one CSV is wanted, this one holds {len(members)} files")
            size = archive.getinfo(members[0]).file_size  # no more than that is read
            if size > (room := psutil.virtual_memory().available):
                raise UserError(
                    f"{path}: unpacks to {size / 1e9:.1f} GB, and {room / 1e9:.1f} GB of memory are free: unpack it, "
                    "and save it as parquet"
                )
            return archive.read(members[0])
    except NotImplementedError as error:
        cause = f"{error}: pack it with the usual compression"
    except RuntimeError:  # the only one that zipfile raises here
        cause = "it is encrypted: unpack it with its password first"
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        cause = f"{error}: the archive is damaged"
    raise UserError(f"{path}: cannot be read as a table ({cause})")


def listed(names: Iterable[str]) -> str:
    """The first 20 names, and how many there are where these are not all."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f", ... ({len(shown)})" if len(shown) > 20 else "")


def place(file: Path, row: int) -> str:
    """How a person finds a row: counted from 0 without the header, and for CSV also the line in the file."""
    return f"row {row}" + ("" if file.suffix.lower() == ".parquet" else f" (line {row + 2} of the file)")
