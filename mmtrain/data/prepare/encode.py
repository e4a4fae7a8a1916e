"""One item of a dataset → the members of its sample in a shard.

What a preparation has finished: kept beside its shards, so that the next process goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from mmtrain.data.images.photo import decode
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 95
_KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Item(NamedTuple):
    """One image: a file, or its bytes. With a class, a file of targets, or targets as bytes."""

    label: int = 0
    path: str = ""
    content: bytes = b""
    target: str = ""
    note: bytes = b""


class BadSample(UserError):
    """An item whose files were read but hold nothing usable; ``--skip-bad`` leaves such ones out."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}; replace or remove it, then start again")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.path, self.reason)  # it comes back from worker processes


class Encoded(NamedTuple):
    """A sample's members (suffix → bytes), and what is counted over a split for its meta.json."""

    members: dict[str, bytes]
    counts: dict[str, int] = {}  # noqa: RUF012  # never changed


class Encoder(Protocol):
    """Makes the members of a sample. It is pickled for worker processes."""

    #: The samples have class numbers (``.cls``), so that their shards can be indexed for training.
    labelled: ClassVar[bool]

    def __call__(self, item: Item) -> Encoded:
        """Read and convert ``item``. Raises BadSample, and UserError for files that cannot be read."""
        ...


@dataclass(frozen=True)
class ClassEncoder:
    """An image and its class number. ``image_size``: its shorter side is shrunk to that many pixels at most."""

    image_size: int | None = None
    quality: int = QUALITY
    labelled: ClassVar[bool] = True

    def __call__(self, item: Item) -> Encoded:
        suffix, content, _ = encode_image(item, self.image_size, self.quality)
        return Encoded({suffix: content, "cls": str(item.label).encode()})


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror})") from error


def encode_image(item: Item, image_size: int | None, quality: int) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes, and the size (W, H) before shrinking.

    The file as it is where that is possible, after decoding it fully to see that it can be. The suffix is that of the
    format found, whatever the file is called. CMYK becomes RGB, since not every decoder can do it.
    """
    from PIL import Image

    content = item.content or read_file(item.path)
    try:
        image = decode(content)
        with Image.open(io.BytesIO(content)) as header:
            kind, mode = header.format or "", header.mode
    except ValueError as error:
        raise BadSample(item.path, f"the image cannot be decoded ({error})") from error
    full = image.size
    small = image_size is None or min(full) <= image_size
    if small and kind in _KEPT_FORMATS and mode != "CMYK":
        return _KEPT_FORMATS[kind], content, full
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        image = decode(content, channels=1)
    if not small and image_size is not None:
        image = image.resize(shrunk(full, image_size), Image.Resampling.BICUBIC)
    lossy = kind == "JPEG"
    return ("jpg" if lossy else "png"), to_bytes(image, quality if lossy else None), full


def shrunk(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """The size (W, H) with the shorter side at most ``shorter`` pixels, in the same proportions."""
    if min(size) <= shorter:
        return size
    scale = shorter / min(size)
    return max(shorter, round(size[0] * scale)), max(shorter, round(size[1] * scale))


def to_bytes(image: Image, quality: int | None) -> bytes:
    """JPEG of that quality, or PNG (None)."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


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
