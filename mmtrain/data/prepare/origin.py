"""What a dataset was prepared from: where it lay, and what was in it.

A folder that was moved, or is named by another path, is the same source: its content counts, not its place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import os_errors

#: Settings that are paths. Their files count as content, too.
PATHS = ("source", "calendar", "val_labels")
#: Files that are read whole for a digest, together; of more only the ends of some are read.
_READ, _SOME, _END = 256 << 20, 64, 64 << 10


@dataclass(frozen=True)
class Origin:
    """``name``: as meta.json has it. ``paths``: the files and folders that it stands for, none for made-up data."""

    name: str
    paths: tuple[Path, ...] = ()

    @classmethod
    def of(cls, *paths: str | Path | None) -> Origin:
        """The first path is the one that is named; of the others only the content counts."""
        given = tuple(Path(os.path.realpath(Path(path).expanduser())) for path in paths if path is not None)
        return cls(str(given[0]), given)

    def to_meta(self) -> dict[str, Any]:
        """The part of meta.json that :meth:`matches` looks at."""
        return {"source": self.name, **({"content": self.content()} if self.paths else {})}

    def matches(self, meta: Mapping[str, Any]) -> bool:
        """Whether ``meta`` is of a dataset with this content. One of version 0.1.0 does not say what its content is."""
        return bool(self.paths) and meta.get("content") == self.content()

    def content(self) -> str:
        """A digest of the names below the paths and the sizes of the files, and of what is in the files.

        All is read where that is little; else the beginnings and the ends of some files spread over all of them. Hidden
        files and the indexes of shards are left out.

        Raises:
            UserError: for files that cannot be read.
        """
        digest = hashlib.blake2b(digest_size=16)
        with os_errors(f"{self.name}: cannot be read"):
            found = [(number, *entry) for number, path in enumerate(self.paths) for entry in _files(path)]
            for number, name, _, size in found:
                digest.update(f"{number} {name!r} {size}\n".encode("utf-8", "surrogateescape"))
            whole = sum(entry[3] for entry in found) <= _READ
            for *_, file, size in found if whole else found[:: -(-len(found) // _SOME)]:
                with open(file, "rb") as stream:
                    if whole:
                        digest.update(hashlib.file_digest(stream, "blake2b").digest())
                    else:
                        digest.update(stream.read(_END))
                        stream.seek(max(0, size - _END))
                        digest.update(stream.read(_END))
        return digest.hexdigest()


def same_path(one: Any, other: Any) -> bool:
    """Whether two values of meta.json name the same place; a source may be several paths (", " and "; ")."""
    return isinstance(one, str) and isinstance(other, str) and _real(one) == _real(other)


def _real(name: str) -> list[list[str]]:
    return [[os.path.realpath(path) for path in part.split(", ")] for part in name.split("; ")]


def _files(path: Path) -> Iterator[tuple[str, Path, int]]:
    """Name below ``path``, path and size of each file, in the order of the names."""
    if not path.is_dir():
        yield "", path, path.stat().st_size
        return
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix != ".idx" and file.is_file():
                yield file.relative_to(path).as_posix(), file, file.stat().st_size
