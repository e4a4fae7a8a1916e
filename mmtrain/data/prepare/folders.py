"""Finding the splits, classes and images in a folder, and reporting the files that are ignored."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.data.images.formats import image_suffixes
from mmtrain.errors import UserError, os_errors
from mmtrain.log import logger

#: Folder names of each split, in lower case. Upper and lower case are equivalent.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_HEIC = (".heic", ".heif")
#: Maximum number of kinds of ignored files in a message.
_MOST = 6


@dataclass
class Ignored:
    """Files and folders that a preparation ignores: the number of each kind, and the first path of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str | Path) -> None:
        """Count an ignored file or folder."""
        self.counts[kind] += 1
        self.first.setdefault(kind, str(path))

    def file(self, path: str) -> None:
        """Count a file whose extension is not that of an image."""
        suffix = os.path.splitext(path)[1].lower()
        self.add(f"{suffix} files" if suffix else "files without an extension", path)

    def __str__(self) -> str:
        kinds = self.counts.most_common(_MOST)
        more = f", and {len(self.counts) - _MOST} more kinds" if len(self.counts) > _MOST else ""
        hint = "; convert HEIC to JPEG first" if any(f"{suffix} files" in self.counts for suffix in _HEIC) else ""
        return ", ".join(f"{count} {kind} (first: {self.first[kind]})" for kind, count in kinds) + more + hint

    def warn(self, root: Path) -> None:
        """Log a warning if anything was ignored."""
        if self.counts:
            logger.warning("%s: ignored: %s", root, self)


def split_folders(root: Path) -> dict[str, Path]:
    """Return split → folder for the folders in ``root`` whose name is in ``SPLIT_NAMES``.

    Raises:
        UserError: if two folders have names of the same split.
    """
    found: dict[str, Path] = {}
    for name in class_folders(root):
        for split, names in SPLIT_NAMES.items():
            if name.lower() in names:
                if split in found:
                    raise UserError(
                        f"{root}: {found[split].name} and {name} both name the {split} split. Rename one of them"
                    )
                found[split] = root / name
    return found


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in ``folder``, without hidden ones."""
    with os_errors(f"{folder}: cannot be read"), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name))


def check_classes(folder: Path, found: Sequence[str], train: Path, classes: Sequence[str]) -> None:
    """Raise UserError if some classes ``found`` in ``folder`` are not in ``classes``, the classes of ``train``."""
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(
            f"{folder}: contains classes that {train} does not have: {', '.join(unknown[:5])}. Rename or remove them"
        )


def image_files(folder: Path, ignored: Ignored) -> list[Path]:
    """Return the images in ``folder`` and its subfolders, sorted.

    Hidden files are ignored. Images in hidden folders and all other files are ignored too, and counted in ``ignored``.
    """
    return sorted(_images(str(folder), ignored))


def _images(folder: str, ignored: Ignored) -> Iterator[Path]:
    suffixes = image_suffixes()
    for here, folders, files in os.walk(folder, onerror=_unreadable):
        for name in sorted(folders):
            path = os.path.join(here, name)
            if os.path.islink(path):
                ignored.add("links to folders", path)
            elif _hidden(name):
                _count_hidden(path, ignored)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(files):
            path = os.path.join(here, name)
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() not in suffixes:
                ignored.file(path)
            elif os.path.isfile(path):
                yield Path(path)
            else:
                ignored.add("broken links or special files", path)


def files_in(folder: Path, ignored: Ignored) -> list[str]:
    """Return the sorted names of the images directly in ``folder``. Count other files and folders in ``ignored``."""
    suffixes, names = image_suffixes(), []
    with os_errors(f"{folder}: cannot be read"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_file():
                ignored.add("folders", entry.path)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                names.append(entry.name)
            else:
                ignored.file(entry.path)
    return sorted(names)


def count_others(folder: Path, known: Sequence[str], ignored: Ignored) -> None:
    """Count the other folders and images in ``folder`` as ignored. ``known`` are its folders of splits or classes."""
    suffixes = image_suffixes()
    with os_errors(f"{folder}: cannot be read"), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name in known or entry.name.startswith("."):
                continue
            if entry.is_dir():
                ignored.add("other folders", entry.path)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                ignored.add("images outside of a class folder", entry.path)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _count_hidden(folder: str, ignored: Ignored) -> None:
    suffixes = image_suffixes()
    for here, _, files in os.walk(folder, onerror=_unreadable):
        for name in files:
            if os.path.splitext(name)[1].lower() in suffixes:
                ignored.add("images in hidden folders", os.path.join(here, name))
