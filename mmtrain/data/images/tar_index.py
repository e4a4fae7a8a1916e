"""Index of WebDataset tar shards: position of the image and label of each sample.

With the index, any sample can be read with one ``pread``, so training can start at any stream position. The index is
stored next to its shard (``X.tar.idx``, an .npz file without pickles). It contains the size and modification time of
the shard, and its SHA-256 if the whole shard was read. Remote shards (``https://``, ``s3://``, ...) and their indexes
are fetched into a cache.

A sample consists of the members that share a sample key (the path up to the first dot of the file name): an image, and
a ``.cls`` file with the class number or a ``.json`` file with ``"label"``. Other members are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.fingerprint import digest
from mmtrain.data.core.retry import Unreachable
from mmtrain.data.images.cache import ShardCache, is_address
from mmtrain.data.images.tar_members import CURE_SHARD, Damaged, open_shard, read_members
from mmtrain.errors import os_errors
from mmtrain.files import complete_or_absent
from mmtrain.log import logger

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_FORMAT = 1
_META_NAME = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members
#: Maximum size of a .cls or .json member, in bytes, and maximum class number (the same as in FFCV).
_MOST_LABEL_BYTES, _MOST_LABEL = 1 << 24, 2**31 - 1
#: Lock for reading array headers. NumPy parses them as Python source, and in Python 3.11 two threads that do so at once
#: may raise "SystemError: AST constructor recursion depth mismatch" (python/cpython#106905).
_parsing = threading.Lock()


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in the order of the tar."""

    path: Path | str  # str: a URL
    keys: NDArray[np.str_]  # (n,)
    offsets: NDArray[np.int64]  # (n,) first byte of the image in the tar
    sizes: NDArray[np.int64]  # (n,) bytes of the image
    labels: NDArray[np.int64]  # (n,) class number
    bytes: int = 0  # of the shard
    changed: int = 0  # modification time of the shard in ns; 0 for a URL
    digest: str = ""  # SHA-256 of the shard; "" if unknown
    fault: str = ""  # why samples are missing, if damaged samples are skipped

    def __len__(self) -> int:
        return len(self.offsets)

    def samples_digest(self) -> str:
        """Return a digest of the keys, sizes and labels of the samples in order, without their positions."""
        return digest(self.keys.tolist(), self.sizes, self.labels, size=4)

    def changed_since(self, stat: os.stat_result) -> bool:
        """Return whether the shard, whose current state is ``stat``, changed since it was indexed."""
        return stat.st_size != self.bytes or (self.changed != 0 and stat.st_mtime_ns != self.changed)


def index_path(shard: Path) -> Path:
    """Return the path of the index file of a shard."""
    return shard.with_name(shard.name + ".idx")


def index_shard(path: str | Path, *, rebuild: bool = False) -> ShardIndex:
    """Return the index of one shard. Read its index file, or create (and if possible write) it.

    Args:
        rebuild: create the index even if there is an index file.

    Raises:
        UserError: if the shard is missing, truncated or empty, has a duplicate sample or one without image or label, or
            has members with paths outside of the archive.
    """
    return index_shards([path], rebuild=rebuild)[0]


def index_shards(
    paths: Sequence[str | Path],
    *,
    rebuild: bool = False,
    digest: bool = False,
    skip: bool = False,
    cache: ShardCache | None = None,
    threads: int = 8,
) -> list[ShardIndex]:
    """Return the indexes of several shards, in order, as ``index_shard`` does. Warnings are logged once for all shards.

    Args:
        digest: read each shard completely and store its SHA-256, against which downloads of the shard are checked.
        skip: return the readable samples of a damaged shard (none if it is missing) and describe the damage in
            ``ShardIndex.fault``, instead of raising UserError.
        cache: local copies of shards at URLs.
        threads: shards that are indexed at the same time.
    """
    makers = [_Maker(path, rebuild, digest, skip, cache) for path in paths]
    with ThreadPoolExecutor(min(threads, max(1, len(makers)))) as pool:
        indexes = list(pool.map(_Maker.index, makers))
    changed = [maker.shard for maker in makers if maker.changed]
    unwritten = [maker.shard for maker in makers if maker.unwritten]
    if changed:
        logger.warning(
            "%d shard(s) changed since they were indexed and were indexed again: %s", len(changed), _some(changed)
        )
    if unwritten:
        logger.warning(
            "cannot write the index of %d shard(s) (%s); it is kept in memory and created again at every start: %s",
            len(unwritten),
            next(maker.unwritten for maker in makers if maker.unwritten),
            _some(unwritten),
        )
    return indexes


def _some(shards: Sequence[Path | str]) -> str:
    return f"{shards[0]}{', ...' if len(shards) > 1 else ''}"


class _Maker:
    """Reads or creates one index.

    Attributes:
        changed: whether the shard changed since it was indexed.
        unwritten: why the index file could not be written ("": no error).
    """

    def __init__(self, shard: Path | str, rebuild: bool, digest: bool, skip: bool, cache: ShardCache | None) -> None:
        self.shard: Path | str = shard if is_address(shard) else Path(shard)
        self.rebuild, self.digest, self.skip, self.cache = rebuild, digest, skip, cache
        self.changed, self.unwritten = False, ""

    def index(self) -> ShardIndex:
        try:
            return self._far() if isinstance(self.shard, str) else self._near(self.shard)
        except (Damaged, Unreachable) as error:
            if not self.skip:
                raise
            none = np.empty(0, np.int64)
            return ShardIndex(
                self.shard, np.empty(0, "U1"), none, none, none, fault=str(error).removeprefix(f"{self.shard}: ")
            )

    def _near(self, shard: Path) -> ShardIndex:
        with os_errors(f"{shard}: cannot read the shard", kind=Damaged):
            stat = shard.stat()
        if not self.rebuild and index_path(shard).exists():
            found = _read(index_path(shard), shard)
            if found is not None and not found.changed_since(stat) and (found.digest or not self.digest):
                return found
            self.changed = found is None or found.changed_since(stat)
        with open_shard(shard) as stream:
            index = replace(_walk(shard, stream, self.skip), bytes=stat.st_size, changed=stat.st_mtime_ns)
            if self.digest:
                stream.seek(0)
                index = replace(index, digest=hashlib.file_digest(stream, "sha256").hexdigest())
        return self._stored(index, index_path(shard))

    def _far(self) -> ShardIndex:
        """Return the index of a shard at a URL. Fetch its index file, or fetch the shard and index it."""
        address = str(self.shard)
        if self.cache is None:
            raise ValueError(f"{address}: a URL needs a cache")
        kept = self.cache.place(address + ".idx")
        found = _read(kept, address) if kept.exists() and not self.rebuild else None
        if found is None and not self.rebuild:
            with suppress(Unreachable):
                found = _read(self.cache.fetch(address + ".idx"), address)
        size = self.cache.size(address)
        if found is not None and size in (None, found.bytes):
            return found
        self.changed = found is not None
        with self.cache.open(address, fresh=found is not None) as stream:
            digest, size = hashlib.file_digest(stream, "sha256").hexdigest(), os.fstat(stream.fileno()).st_size
            index = replace(_walk(address, stream, self.skip), bytes=size, digest=digest)
        return self._stored(index, kept)

    def _stored(self, index: ShardIndex, target: Path) -> ShardIndex:
        if not index.fault:
            self.unwritten = write_index(index, target)
        return index


def _read(file: Path, shard: Path | str) -> ShardIndex | None:
    try:
        with zipfile.ZipFile(file) as archive:
            most, names = file.stat().st_size, set(archive.namelist())
            stamp, keys, offsets, sizes, labels, *rest = (
                _array(archive, name, most)
                for name in ("stamp", "keys", "offsets", "sizes", "labels", "digest")
                if name != "digest" or "digest.npy" in names
            )
        known, size, changed = (int(number) for number in stamp)
        if known != _FORMAT:
            return None
        digest = str(rest[0]) if rest else ""
    except Exception as error:  # zipfile and NumPy raise almost anything; a damaged index is created again
        logger.debug("%s: cannot read the index: %s", file, error)
        return None
    stale = 0 if isinstance(shard, str) else changed
    found = ShardIndex(shard, keys, offsets, sizes, labels, bytes=size, changed=stale, digest=digest)
    return found if _fits(found) else None


def _array(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """Return the array ``name`` of an .npz file. Raises ValueError if it needs more than ``most`` bytes of memory."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
        raise ValueError(f"{name} is compressed, or claims {entry.file_size} bytes")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _parsing:
            shape, fortran, dtype = read_header(stream)
        content = stream.read(entry.file_size)
    if dtype.kind not in "iU" or fortran or prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{name} claims the shape {shape} of {dtype}, but has {len(content)} bytes")
    return np.ndarray(shape, dtype, content)


def _fits(index: ShardIndex) -> bool:
    """Return whether all entries of an index are valid positions in its shard. An index may be fetched from a URL."""
    numbers = (index.offsets, index.sizes, index.labels)
    if index.keys.dtype.kind != "U" or any(array.dtype != np.int64 for array in numbers):
        return False
    if not index.keys.ndim == 1 == len({array.shape for array in (index.keys, *numbers)}):
        return False
    inside = (index.offsets <= index.bytes) & (index.sizes <= index.bytes - index.offsets)
    positive = all(int(array.min(initial=0)) >= 0 for array in numbers)
    return positive and bool(inside.all()) and int(index.labels.max(initial=0)) <= _MOST_LABEL


def write_index(index: ShardIndex, target: Path) -> str:
    """Write an index to the file ``target``. Return why it could not be written ("": it was written)."""
    stamp = np.array([_FORMAT, index.bytes, index.changed], dtype=np.int64)
    arrays: dict[str, Any] = {name: getattr(index, name) for name in ("keys", "offsets", "sizes", "labels")}
    try:
        # Several ranks may index the same shard at once. The last rename wins.
        with complete_or_absent(target) as partial, open(partial, "wb") as stream:
            np.savez(stream, stamp=stamp, digest=np.array(index.digest), **arrays)
    except OSError as error:
        return error.strerror or str(error)
    return ""


@dataclass
class _Sample:
    image: tuple[int, int] | None = None
    cls: int | None = None
    json: int | None = None


def _walk(shard: Path | str, stream: BinaryIO, skip: bool) -> ShardIndex:
    """Index a shard by reading the headers of all members. With ``skip``, describe damage in ``fault``."""
    samples: dict[str, _Sample] = {}
    faults: list[str] = []

    def damaged(message: str) -> None:
        if not skip:
            raise Damaged(message)
        faults.append(message.removeprefix(f"{shard}: "))

    try:
        for member in read_members(shard, stream, damaged):
            if not _META_NAME.match(member.name):
                try:
                    _add(samples, shard, stream, member)
                except Damaged as error:
                    damaged(str(error))
    except Damaged as error:
        damaged(str(error))
    if not samples:
        damaged(f"{shard}: the shard contains no samples; {CURE_SHARD}, or delete it")
    return replace(_collect(shard, samples, damaged), fault="; ".join(faults))


def _add(samples: dict[str, _Sample], shard: Path | str, stream: BinaryIO, member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    suffix = suffix.lower()
    field = "image" if suffix in IMAGE_SUFFIXES else suffix
    if field not in ("image", "cls", "json"):
        return
    sample = samples.setdefault(key, _Sample())
    if getattr(sample, field) is not None:
        raise Damaged(f"{shard}: sample {key!r} has two {field} members. Sample keys must be unique; {CURE_SHARD}")
    if field == "image":
        sample.image = (member.offset_data, member.size)
        return
    if member.size > _MOST_LABEL_BYTES:
        raise Damaged(
            f"{shard}: {member.name!r} has {member.size} bytes, more than the limit of {_MOST_LABEL_BYTES} for a label;"
            f" {CURE_SHARD}"
        )
    with os_errors(f"{shard}: cannot read the shard", kind=Damaged):
        content = os.pread(stream.fileno(), member.size, member.offset_data)
    try:
        label = json.loads(content)["label"] if field == "json" else int(content)
    except (ValueError, KeyError, TypeError, RecursionError):  # RecursionError: deeply nested JSON
        label = None
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label <= _MOST_LABEL:
        if field == "json":
            return  # metadata without a label; the label may be in a .cls member
        raise Damaged(
            f"{shard}: {member.name!r} contains {content[:40]!r}, but a .cls member must be a class number from 0 to "
            f"{_MOST_LABEL}; {CURE_SHARD}"
        )
    setattr(sample, field, label)


def _collect(shard: Path | str, samples: dict[str, _Sample], damaged: Callable[[str], None]) -> ShardIndex:
    complete: dict[str, tuple[int, int, int]] = {}  # key → offset, size, label
    for key, sample in samples.items():
        label = sample.cls if sample.cls is not None else sample.json
        if sample.image is None:
            suffixes = ", ".join("." + suffix for suffix in IMAGE_SUFFIXES)
            damaged(f"{shard}: sample {key!r} has no image ({suffixes}); {CURE_SHARD}")
        elif label is None:
            damaged(
                f'{shard}: sample {key!r} has no label. Add a .cls member with the class number, or "label" to its '
                f".json; {CURE_SHARD}"
            )
        else:
            complete[key] = (*sample.image, label)
    offsets, sizes, labels = np.array(list(complete.values()), dtype=np.int64).reshape(-1, 3).T
    return ShardIndex(shard, np.array(list(complete), dtype=np.str_), offsets.copy(), sizes.copy(), labels.copy())
