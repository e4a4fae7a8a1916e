"""What a preparation has finished: kept beside its shards, so that the next process goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.data.prepare.encode import Item
from mmtrain.errors import UserError

_NAME = "finished.jsonl"


@dataclass(frozen=True)
class Finished:
    """One shard: its file and what it was made of."""

    name: str  # such as train/shard-000000.tar
    size: int  # bytes; 0 without a file, if all of its samples were skipped
    sha256: str
    sources: str  # digest of the names, sizes and times of the files it was made of
    samples: int
    skipped: list[list[str]] = field(default_factory=list)  # path and reason
    counts: dict[str, int] = field(default_factory=dict)  # what the encoder counted

    def holds(self, folder: Path, items: Sequence[Item]) -> bool:
        """Whether the shard is there as it was written, and its sources have not changed since."""
        path = folder / self.name
        try:
            if self.sources != sources_digest(items):
                return False
            if not self.size:
                return not path.exists()
            if path.stat().st_size != self.size:
                return False
            with open(path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256
        except (OSError, UserError):
            return False  # written again, and then what is wrong is said


class Ledger:
    """The shards that are finished, a line for each, in the order in which they were."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME

    def read(self) -> dict[str, Finished]:
        """By name; a line that was cut short by a kill is as if it were not there."""
        return {entry.name: entry for entry in self._entries()}

    def _entries(self) -> Iterator[Finished]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield Finished(**json.loads(line))
            except (ValueError, TypeError):
                continue

    def add(self, entry: Finished) -> None:
        with open(self.path, "ab") as stream:
            if stream.tell() and not self._ends():
                stream.write(b"\n")  # after a line that was cut short
            stream.write(json.dumps(asdict(entry)).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _ends(self) -> bool:
        with open(self.path, "rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read() == b"\n"


def recipe_digest(source: str, settings: Mapping[str, Any], splits: Mapping[str, Sequence[Item]]) -> str:
    """12 hex digits that are the same for the same source, settings and list of items."""
    found = hashlib.sha256(json.dumps([source, dict(settings)], sort_keys=True).encode())
    for split, items in splits.items():
        found.update(f"\n{split} {len(items)}\n".encode())
        for item in items:
            found.update(f"{item.label} {item.path!r} {item.target!r} {len(item.content)} {len(item.note)}\n".encode())
            found.update(item.content + item.note)
    return found.hexdigest()[:12]


def sources_digest(items: Sequence[Item]) -> str:
    """SHA-256 of names, sizes and modification times of the files of ``items``; none is read."""
    found = hashlib.sha256()
    for item in items:
        for path in (item.path, item.target):
            if path:
                try:
                    stat = os.stat(path)
                except OSError as error:
                    raise UserError(f"{path}: cannot read the file ({error.strerror})") from error
                found.update(f"{path!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()
