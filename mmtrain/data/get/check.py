"""Whether a file is the table that the registry describes, and how sure that is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mmtrain.data.get.digest import Content, read_content
from mmtrain.data.get.registry import Dataset
from mmtrain.errors import UserError


@dataclass(frozen=True)
class Checked:
    path: Path
    sha256: str  # of the file
    content: Content
    how: str  # what the check rests on, for people


def check_table(path: Path, dataset: Dataset) -> Checked:
    """Compare the content of ``path`` with ``dataset``. Raises UserError with all that differs."""
    content = read_content(path)
    names = [tuple(_plain(name) for name in each.columns) for each in (content, dataset)]
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
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _plain(name: str) -> str:
    """The benchmark's weather.csv has lost its µ and ²: what is not ASCII is not compared."""
    return "".join(letter for letter in name if letter.isascii())


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{', '.join(value[:3])}, ..., {value[-1]} ({len(value)})" if len(value) > 4 else ", ".join(value)
