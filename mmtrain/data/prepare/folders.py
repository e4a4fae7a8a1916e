"""Which folders are splits and classes, which files are images, and what stands beside them and is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.data.images.formats import image_suffixes
from mmtrain.errors import UserError, os_errors
from mmtrain.log import logger

#: The names of the folders of a split, in lower case; any case is taken.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_HEIC = (".heic", ".heif")
#: How many kinds of files are named.
_MOST = 6


@dataclass
class LeftOut:
    """What a preparation did not take: how many of each kind, and the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str | Path) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, str(path))

    def file(self, path: str) -> None:
        """A file that is no image by its name."""
        suffix = os.path.splitext(path)[1].lower()
        self.add(f"{suffix} files" if suffix else "files without an ending", path)

    def __str__(self) -> str:
        kinds = self.counts.most_common(_MOST)
        more = f", and {len(self.counts) - _MOST} kinds more" if len(self.counts) > _MOST else ""
        hint = "; convert HEIC to JPEG first" if any(f"{suffix} files" in self.counts for suffix in _HEIC) else ""
        return ", ".join(f"{count} {kind} (first: {self.first[kind]})" for kind, count in kinds) + more + hint

    def tell(self, root: Path) -> None:
        """Warn, in a line, if there is anything to say."""
        if self.counts:
            logger.warning("%s: left out: %s", root, self)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders in ``root`` that are named as a split, whatever their case. Raises UserError for two of one split."""
    found: dict[str, Path] = {}
    for name in class_folders(root):
        for split, names in SPLIT_NAMES.items():
            if name.lower() in names:
                if split in found:
                    raise UserError(
                        f"{root}: {found[split].name} and {name} could both be the {split} split: rename one of them"
                    )
                found[split] = root / name
    return found


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted; hidden ones are left out."""
    with os_errors(f"{folder}: cannot be read"), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name))


def check_classes(folder: Path, found: Sequence[str], train: Path, classes: Sequence[str]) -> None:
    """Raise UserError if ``folder`` has classes that the training images in ``train`` do not have."""
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(f"{folder}: classes that {train} does not have: {', '.join(unknown[:5])}")


def image_files(folder: Path, left: LeftOut) -> list[Path]:
    """The images in ``folder`` and in all folders below it, sorted.

    What is hidden, or below a hidden folder, is no image; it and all else goes to ``left``.
    """
    return sorted(_images(str(folder), left))


def _images(folder: str, left: LeftOut) -> Iterator[Path]:
    suffixes = image_suffixes()
    for here, folders, files in os.walk(folder, onerror=_unreadable):
        for name in sorted(folders):
            path = os.path.join(here, name)
            if os.path.islink(path):
                left.add("links to folders", path)
            elif _hidden(name):
                _count_hidden(path, left)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(files):
            path = os.path.join(here, name)
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() not in suffixes:
                left.file(path)
            elif os.path.isfile(path):
                yield Path(path)
            else:
                left.add("links to nothing, or no files", path)


def files_in(folder: Path, left: LeftOut) -> list[str]:
    """The names of the images in ``folder`` itself, sorted; other files, and the folders in it, go to ``left``."""
    suffixes, names = image_suffixes(), []
    with os_errors(f"{folder}: cannot be read"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_file():
                left.add("folders", entry.path)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                names.append(entry.name)
            else:
                left.file(entry.path)
    return sorted(names)


def note_beside(folder: Path, taken: Sequence[str], left: LeftOut) -> None:
    """Note what stands beside the folders ``taken`` of ``folder``, which are splits or classes."""
    suffixes = image_suffixes()
    with os_errors(f"{folder}: cannot be read"), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name in taken or entry.name.startswith("."):
                continue
            if entry.is_dir():
                left.add("folders beside those that are read", entry.path)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                left.add("images outside of a class folder", entry.path)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _count_hidden(folder: str, left: LeftOut) -> None:
    suffixes = image_suffixes()
    for here, _, files in os.walk(folder, onerror=_unreadable):
        for name in files:
            if os.path.splitext(name)[1].lower() in suffixes:
                left.add("images in hidden folders", os.path.join(here, name))
