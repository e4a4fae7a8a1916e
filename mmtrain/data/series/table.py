"""A table of one time series: CSV or parquet → float64 values, with every fault named before training starts."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError, nearest
from mmtrain.log import logger

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".zip")
TIME_NAMES = ("date", "datetime", "timestamp", "time")
FILLS = ("ffill", "interpolate", "zero")
MISSING = ("error", *FILLS, "mask")


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


def read_frame(path: Path) -> pd.DataFrame:
    """The file as pandas reads it; a ``.zip`` must hold one CSV."""
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.namelist() if not member.endswith("/")]
                if len(members) != 1:
                    raise UserError(f"{path}: a zip of one CSV is wanted, this one holds {len(members)} files")
                frame = pd.read_csv(io.BytesIO(archive.read(members[0])))
        else:
            frame = pd.read_csv(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # pandas' and arrow's parser errors are ValueErrors
        raise UserError(f"{path}: cannot be read as a table ({error})") from error
    frame.columns = [str(column) for column in frame.columns]
    if frame.empty:
        raise UserError(f"{path}: the table holds no rows")
    return frame


def read_table(
    path: str | Path,
    *,
    time_column: str | None = "date",
    columns: Sequence[str] | None = None,
    missing: str = "error",
    data_root: str | Path | None = None,
    known: Sequence[str] = (),
) -> SeriesTable:
    """Read a CSV (also zipped) or parquet file with one row for each time step.

    ``time_column``: "date" or None take the first column named date, datetime, timestamp or time, if there is one; any
    other name must exist. ``columns``: which to use, in this order (None: all but the time column). ``missing``: what
    to do with holes (empty, NaN, infinite): "error", "ffill" (last value before: never looks ahead), "interpolate"
    (linear, nearest at the ends), "zero", or "mask" (they stay, as NaN). ``known``: columns known in advance, which are
    no targets and may have no holes; rows at the end in which only they are given lie ahead of the values.
    Raises UserError naming file, column, row and cure.
    """
    if missing not in MISSING:
        raise UserError(f"data.missing={missing!r}: one of {', '.join(MISSING)}{nearest(missing, MISSING)}")
    file = find_table(path, data_root)
    frame = read_frame(file)
    time_name = find_time_column(frame, file, time_column)
    stamps = None if time_name is None else _stamps(frame[time_name], file, time_name)
    names = _columns(frame, file, time_name, columns, known)
    cure = "; correct it, or name the columns to use: data.columns=[...]"
    values, beside = numbers_in(frame, file, names, cure), None
    if known:
        beside = numbers_in(frame, file, known, cure)
        seen: NDArray[np.bool_] = np.asarray(np.isfinite(values).any(axis=1))
        values = values[: len(seen) - int(np.argmax(seen[::-1])) if seen.any() else 0].copy()
    filled = _fill(values, names, file, missing)
    if beside is not None:
        _fill(beside, list(known), file, "error" if missing == "mask" else missing)
    return SeriesTable(values, names, stamps, file, filled, beside, int((~np.isfinite(values)).sum()))


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
            raise UserError(
                f"{file}: column {name!r} is not numeric: {place(file, row)} holds {text.iloc[row]!r}{cure}"
            )
        values[:, number] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        mark_too_large(values[:, number])
    return values


def mark_too_large(values: NDArray[np.float64]) -> None:
    """Make infinite, in place, what is too large for float32."""
    values[np.abs(values) > np.finfo(np.float32).max] = np.inf


def find_time_column(frame: pd.DataFrame, file: Path, wanted: str | None) -> str | None:
    if wanted in frame.columns:
        return wanted
    if wanted not in (None, "date"):
        raise UserError(
            f"{file}: no time column {wanted!r}{nearest(wanted, frame.columns)}; its columns are "
            f"{listed(frame.columns)}: set data.time_column"
        )
    return next((name for name in frame.columns if name.strip().lower() in TIME_NAMES), None)


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


def listed(names: Iterable[str]) -> str:
    """The first 20 names, and how many there are where these are not all."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f", ... ({len(shown)})" if len(shown) > 20 else "")


def _stamps(column: pd.Series, file: Path, name: str) -> NDArray[np.datetime64] | None:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        logger.info("%s: time column %r holds numbers, not dates; it is left out", file, name)
        return None
    stamps = parse_times(column)
    if stamps.isna().any():
        row = int(np.argmax(stamps.isna().to_numpy()))
        raise UserError(
            f"{file}: time column {name!r}, {place(file, row)}: {column.iloc[row]!r} is no date; correct it, or set "
            "data.time_column"
        )
    found = stamps.to_numpy().astype("datetime64[us]")
    duplicates, irregular, step = regularity(found)
    if duplicates or irregular:
        logger.warning(
            "%s: %d repeated time stamp(s) and %d step(s) that differ from the usual %s; rows are taken as they come",
            file,
            duplicates,
            irregular,
            step,
        )
    return found


def parse_times(column: pd.Series) -> pd.Series:
    """Times in UTC without a zone, NaT for what is no date; text with changing UTC offsets can be read too."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a format that is not one of the usual
        return pd.to_datetime(column, errors="coerce", utc=True).dt.tz_localize(None)


def regularity(stamps: NDArray[np.datetime64]) -> tuple[int, int, Any]:
    """Repeated stamps, other steps that differ from the usual one, and the usual step (a pandas Timedelta or None)."""
    import pandas as pd

    if len(stamps) < 2:
        return 0, 0, None
    steps = np.diff(stamps.astype("datetime64[us]").astype(np.int64))
    known, counts = np.unique(steps, return_counts=True)
    usual = int(known[np.argmax(counts)])
    duplicates = int((steps == 0).sum())
    irregular = int(((steps != usual) & (steps != 0)).sum())
    return duplicates, irregular, pd.Timedelta(usual, unit="us")


def place(file: Path, row: int) -> str:
    """How a person finds a row: counted from 0 without the header, and for CSV also the line in the file."""
    return f"row {row}" + ("" if file.suffix.lower() == ".parquet" else f" (line {row + 2} of the file)")


def _fill(values: NDArray[np.float64], names: list[str], file: Path, missing: str) -> int:
    """Fill holes in place; the number filled."""
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
                f"{place(file, first)}; fill them, or set data.missing=ffill (or interpolate, zero, mask)"
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
