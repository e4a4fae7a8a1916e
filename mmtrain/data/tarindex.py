"""Index of WebDataset tar shards: where each sample's image lies and what its label is.

With an index, any sample is one ``pread`` away, which is what lets the data clock start anywhere. The index lies beside
the shard (``X.tar.idx``, an .npz without pickles) and remembers the shard's size and modification time.

A sample is the members that share a key (the name up to the first dot of its last part): one image and a ``.cls`` file
with the class number, or a ``.json`` file with ``"label"``. Other members are left alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_FORMAT = 1
_META_NAME = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members
_CURE_SHARD = "copy or prepare the shard again (mmtrain data prepare images --force)"
#: numpy parses the header of an array as Python source, which Python 3.11 may not do in two threads at once: now and
#: then it ends in "SystemError: AST constructor recursion depth mismatch" (python/cpython#106905).
_parsing = threading.Lock()
_log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard, in the order of the tar."""

    path: Path
    keys: NDArray[np.str_]  # (n,)
    offsets: NDArray[np.int64]  # (n,) first byte of the image in the tar
    sizes: NDArray[np.int64]  # (n,) bytes of the image
    labels: NDArray[np.int64]  # (n,) class number

    def __len__(self) -> int:
        return len(self.offsets)


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def index_shard(path: str | Path, *, rebuild: bool = False) -> ShardIndex:
    """The index of one shard: read from beside it, or made (and written there if the folder allows it).

    Raises UserError for a shard that is missing, truncated, empty, holds a sample twice, without image or without
    label, or names files outside of the archive.
    """
    return index_shards([path], rebuild=rebuild)[0]


def index_shards(paths: Sequence[str | Path], *, rebuild: bool = False, threads: int = 8) -> list[ShardIndex]:
    """``index_shard`` for many, in the order given; what needs saying is said once, not once for each shard."""
    shards = [Path(path) for path in paths]
    with ThreadPoolExecutor(min(threads, max(1, len(shards)))) as pool:
        results = list(pool.map(lambda shard: _load_or_build(shard, rebuild), shards))
    changed = [index.path for index, state, _ in results if state == "changed"]
    unwritten = [(index.path, fault) for index, _, fault in results if fault]
    if changed:
        _log.warning("%d shard(s) changed since they were indexed, so were indexed again: %s", *_count(changed))
    if unwritten:
        _log.warning(
            "cannot write the index of %d shard(s) (%s); it is kept in memory and made again at every start: %s",
            len(unwritten),
            unwritten[0][1],
            _count([path for path, _ in unwritten])[1],
        )
    return [index for index, _, _ in results]


def _count(paths: list[Path]) -> tuple[int, str]:
    return len(paths), str(paths[0]) + (", ..." if len(paths) > 1 else "")


def _load_or_build(shard: Path, rebuild: bool) -> tuple[ShardIndex, str, str]:
    """The index, how it came ("read", "made", "changed") and why it could not be written ("" if it was)."""
    try:
        stat = shard.stat()
    except OSError as error:
        raise UserError(f"{shard}: cannot read the shard ({error.strerror})") from error
    stamp = np.array([_FORMAT, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
    state = "made"
    if not rebuild and index_path(shard).exists():
        found = _read(shard, stamp)
        if found is not None:
            return found, "read", ""
        state = "changed"
    index = _walk(shard)
    return index, state, _write(index, stamp)


def _read(shard: Path, stamp: NDArray[np.int64]) -> ShardIndex | None:
    try:
        with np.load(index_path(shard), allow_pickle=False) as archive:
            with _parsing:
                known = archive["stamp"]
            if not np.array_equal(known, stamp):
                return None
            with _parsing:
                return ShardIndex(shard, archive["keys"], archive["offsets"], archive["sizes"], archive["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # a damaged index is as good as a stale one


def _write(index: ShardIndex, stamp: NDArray[np.int64]) -> str:
    target = index_path(index.path)
    # Several ranks may index the same shard at once: each writes its own file, the last rename wins.
    part = target.with_name(f"{target.name}.{os.uname().nodename}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            np.savez(
                stream, stamp=stamp, keys=index.keys, offsets=index.offsets, sizes=index.sizes, labels=index.labels
            )
        os.replace(part, target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        return error.strerror or str(error)
    return ""


@dataclass
class _Sample:
    image: tuple[int, int] | None = None
    cls: int | None = None
    json: int | None = None


def _walk(shard: Path) -> ShardIndex:
    samples: dict[str, _Sample] = {}
    try:
        with open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                _check_name(shard, member.name)
                if member.isfile() and not _META_NAME.match(member.name):
                    _add(samples, shard, stream, member)
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            _check_end(shard, stream, archive.offset)
    except tarfile.TarError as error:
        what = "is empty" if shard.stat().st_size == 0 else f"is truncated or not an uncompressed tar ({error})"
        raise UserError(f"{shard}: the shard {what}; {_CURE_SHARD}") from error
    except OSError as error:
        raise UserError(f"{shard}: cannot read the shard ({error.strerror})") from error
    if not samples:
        raise UserError(f"{shard}: the shard holds no samples; {_CURE_SHARD}, or delete it")
    return _collect(shard, samples)


def _check_name(shard: Path, name: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise UserError(
            f"{shard}: member {name!r} points outside of the archive. Nothing is ever extracted, but no tool for "
            f"shards writes such names: check where the file comes from; {_CURE_SHARD}"
        )


def _check_end(shard: Path, stream: BinaryIO, offset: int) -> None:
    """tarfile takes a damaged or missing header after the first member for the end of the archive; we do not."""
    if os.fstat(stream.fileno()).st_size - offset < tarfile.BLOCKSIZE:
        raise UserError(f"{shard}: the shard is truncated: its end-of-archive mark is missing; {_CURE_SHARD}")
    stream.seek(offset)
    while chunk := stream.read(1 << 20):
        if chunk.strip(b"\0"):
            raise UserError(
                f"{shard}: byte {offset} is followed by data that is no tar member (damaged, or several tars joined "
                f"into one file); {_CURE_SHARD}"
            )


def _add(samples: dict[str, _Sample], shard: Path, stream: BinaryIO, member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    suffix = suffix.lower()
    field = "image" if suffix in IMAGE_SUFFIXES else suffix
    if field not in ("image", "cls", "json"):
        return
    sample = samples.setdefault(key, _Sample())
    if getattr(sample, field) is not None:
        raise UserError(f"{shard}: sample {key!r} has two {field} members: keys must be unique; {_CURE_SHARD}")
    if field == "image":
        sample.image = (member.offset_data, member.size)
        return
    content = os.pread(stream.fileno(), member.size, member.offset_data)
    if len(content) < member.size:
        raise UserError(f"{shard}: the shard is truncated within {member.name!r}; {_CURE_SHARD}")
    label = _label(content, field)
    if label is None:
        if field == "json":
            return  # metadata without a label; .cls may hold it
        raise UserError(f"{shard}: {member.name!r} holds {content[:40]!r}: a .cls member is a class number 0, 1, ...")
    setattr(sample, field, label)


def _label(content: bytes, field: str) -> int | None:
    try:
        value = json.loads(content)["label"] if field == "json" else int(content)
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _collect(shard: Path, samples: dict[str, _Sample]) -> ShardIndex:
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    for key, sample in samples.items():
        label = sample.cls if sample.cls is not None else sample.json
        if sample.image is None:
            raise UserError(
                f"{shard}: sample {key!r} has no image ({', '.join('.' + s for s in IMAGE_SUFFIXES)}); {_CURE_SHARD}"
            )
        if label is None:
            raise UserError(
                f'{shard}: sample {key!r} has no label: add a .cls member with the class number, or "label" to its '
                f".json; {_CURE_SHARD}"
            )
        places.append(sample.image)
        labels.append(label)
    offsets, sizes = np.array(places, dtype=np.int64).T
    return ShardIndex(shard, np.array(list(samples)), offsets.copy(), sizes.copy(), np.array(labels, dtype=np.int64))
