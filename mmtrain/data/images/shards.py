"""Images in WebDataset tar shards: finding the shards of a path, reading them, and the data source."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.data.core.fingerprint import Fingerprint, digest
from mmtrain.data.core.retry import Absent, Unreachable, persistently
from mmtrain.data.core.source import Batch, Empty, Fault
from mmtrain.data.images.cache import ShardCache, file_system, is_address
from mmtrain.data.images.photo import Photo, Undecodable
from mmtrain.data.images.tar_index import ShardIndex, index_shards
from mmtrain.data.images.tar_members import Damaged
from mmtrain.data.images.transforms import build_transform, new_tensor
from mmtrain.errors import UserError, nearest, os_errors
from mmtrain.log import logger

#: Number of samples after a damaged one that are tried as its replacement.
_STAND_INS = 64
#: Maximum length of a brace pattern, in characters, and maximum number of names that it may expand to.
_LONGEST_PATTERN, _MOST_SHARDS = 4096, 1_000_000
#: Seconds before the second attempt to list a folder or to read meta.json at a URL.
_PAUSE = 1.0
Shard = Path | str  # a str is a URL


def find_shards(path: str | Path | Sequence[str | Path], *, missing: bool = False) -> list[Shard]:
    """Return the tar shards that ``path`` refers to.

    Args:
        path: a folder (its ``*.tar`` files, sorted), a brace pattern such as ``shard-{000000..000003}.tar`` or
            ``{part1,part2}`` (shards or folders), or a list of these. Each may be a URL.
        missing: also return shards that are named but do not exist, unless all are missing.

    Raises:
        UserError: if there are no shards, or some are missing.
    """
    if not isinstance(path, str | Path):
        return [shard for part in path for shard in find_shards(part, missing=missing)]
    text = os.path.expanduser(str(path))
    if "{" in text:
        parts = _braces(text)
        return _all_there(text, [shard for part in parts for shard in _expanded(part)], missing)
    return _all_there(text, _expanded(text), missing)


def _braces(text: str) -> list[str]:
    """Return the names that a brace pattern expands to. Raises UserError if it is invalid or has too many names."""
    from braceexpand import braceexpand

    cure = "Write it like shard-{000000..000003}.tar"
    if len(text) > _LONGEST_PATTERN:
        raise UserError(f"{text[:60]}...: the brace pattern has more than {_LONGEST_PATTERN} characters. {cure}")
    innermost = re.findall(r"\{([^{}]*)\}", text)
    counts = [_names(group) for group in innermost]
    nested = text.count("{") > len(innermost)  # for nested braces, the product would be too large
    try:
        most = max(counts, default=1) if nested else prod(counts)
        parts = [] if most > _MOST_SHARDS else list(islice(braceexpand(text), _MOST_SHARDS + 1))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{text}: not a valid brace pattern ({error}). {cure}") from error
    if not parts or len(parts) > _MOST_SHARDS:
        raise UserError(f"{text}: the brace pattern expands to more than {_MOST_SHARDS:,} names. {cure}")
    return parts


def _names(group: str) -> int:
    """Return the number of names that one pair of braces expands to: a range ``0..9``, or a list ``a,b``."""
    numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?", group)
    return abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else group.count(",") + 1


def _expanded(text: str) -> list[Shard]:
    if is_address(text):
        return [text] if text.endswith(".tar") else list(_listed(text))
    folder = Path(text)
    if not folder.is_dir():
        return [folder]
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        below = sorted({shard.parent.name for shard in folder.glob("*/*.tar")})
        hint = f" (its subfolders {', '.join(below)} contain shards: use one of these)" if below else ""
        raise UserError(f"{text}: no *.tar shards in this folder{hint}. {_how(folder)}")
    return list(shards)


def _listed(address: str) -> list[str]:
    """Return the shards in the folder at a URL. Raises UserError if there are none or they cannot be listed."""
    system = file_system(address)
    try:
        found = persistently(address, lambda: system.glob(address.rstrip("/") + "/*.tar"), _PAUSE)
    except Unreachable as error:
        raise Unreachable(
            f"{error}. If the folder cannot be listed, name its shards, for example shard-{{000..099}}.tar"
        ) from error
    if not found:
        raise UserError(
            f"{address}: no *.tar shards found. Name them, for example {address}/shard-{{000000..000003}}.tar"
        )
    return sorted(system.unstrip_protocol(name) for name in found)


def _all_there(text: str, shards: list[Shard], missing: bool) -> list[Shard]:
    gone = [shard for shard in shards if isinstance(shard, Path) and not shard.is_file()]
    if not gone or (missing and len(gone) < len(shards)):
        return shards
    what = "no such folder or shard" if len(shards) == 1 else f"{len(gone)} of {len(shards)} shards are missing"
    file = Path.cwd() / gone[0]
    siblings = sorted(entry.name for entry in file.parent.glob("*"))
    raise UserError(f"{text}: {what} (looked for {file}){nearest(file.name, siblings) or '.'} {_how(gone[0])}")


def _how(path: Path) -> str:
    out = path.parent if path.suffix != ".tar" else path.parent.parent
    return (
        f"Create the shards with `mmtrain data prepare images --root IMAGES --out {out}` (or try `mmtrain data prepare "
        "digits --out FOLDER`)"
    )


class ImageShards:
    """Data source of tar shards: {"image": float32 (B, C, S, S) normalised, "label": int64 (B,)}.

    The attributes ``num_classes`` and ``classes`` come from ``meta.json`` in the root of the data set (the folder above
    the split). They are None if there is no such file.

    Args:
        path: shards, as for ``find_shards``.
        image_size, train, mean, std, channels, augment, augment_options: as for ``transforms.build_transform``.
        skip: skip damaged samples, which ``take_faults`` then reports, instead of raising UserError. In training, the
            next usable sample replaces a damaged one (the same for every world size). In evaluation, the damaged sample
            is missing from its batch.
        cache: local copies of shards at URLs.
    """

    moved = ("image",)

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 3,
        augment: str = "none",
        skip: bool = False,
        cache: ShardCache | None = None,
        **augment_options: Any,
    ) -> None:
        self.transform = build_transform(
            train, image_size, augment, mean=mean, std=std, channels=channels, **augment_options
        )
        self.channels, self.train, self.skip = channels, train, skip
        shards = index_shards(find_shards(path, missing=skip), skip=skip, cache=cache)
        self.paths = [shard.path for shard in shards]
        self.block_sizes = [len(shard) for shard in shards]
        whole = [len(shard) for shard in shards if not shard.fault]
        usual = round(sum(whole) / len(whole)) if whole else 1  # mean size, to estimate the loss of a damaged shard
        self._faults = [
            Fault(-1, str(shard.path), shard.fault, max(1, usual - len(shard))) for shard in shards if shard.fault
        ]
        # One array for all shards. The sample keys stay on disk, because they are only needed to report a fault.
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in shards])
        self._digests = [shard.samples_digest() for shard in shards] if train else []
        self._ends = np.cumsum(self.block_sizes)
        self.cache, self._files = cache, ShardFiles(shards, cache)
        first = self.paths[0]
        self.classes = read_classes(
            first.rsplit("/", 2)[0] + "/meta.json" if isinstance(first, str) else first.parent.parent / "meta.json"
        )
        self.num_classes = None if self.classes is None else len(self.classes)
        if self.num_classes is not None and int(self.labels.max(initial=-1)) >= self.num_classes:
            bad = int(np.argmax(self.labels >= self.num_classes))
            raise UserError(
                f"{self.name_of(bad)}: label {self.labels[bad]}, but meta.json lists {self.num_classes} classes (the "
                "first is 0). The shards and meta.json do not match: prepare the data set again"
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def fingerprint(self) -> Fingerprint:
        return {"indexes": self._digests, **({} if self.classes is None else {"classes": digest(self.classes)})}

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        return self.finish(self.load(indices, keys))

    def load(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None, empty: Empty = new_tensor) -> Batch:
        """Return a batch as ``fetch`` does, but with the pixels not yet normalised.

        If damaged samples are missing (in evaluation), "kept" (bool) tells which of ``indices`` are present.
        """
        photos: list[Any] = [None] * len(indices)
        used = np.array(indices, dtype=np.int64)
        for place in np.argsort(indices, kind="stable").tolist():  # in the order of the shards, for sequential reads
            photos[place], used[place] = self._usable(int(indices[place]))
        while True:
            kept = np.array([photo is not None for photo in photos], dtype=bool)
            try:
                pixels = self.transform.pixels(
                    [photo for photo in photos if photo is not None], None if keys is None else keys[kept], empty
                )
            except Undecodable as error:
                place = int(np.flatnonzero(kept)[error.place])
                self._note(int(used[place]), error)
                photos[place], used[place] = self._stand_in(int(used[place]))
                continue
            batch = {"image": pixels, "label": torch.from_numpy(self.labels[used[kept]])}
            return batch if kept.all() else {**batch, "kept": torch.from_numpy(kept)}

    def finish(self, batch: Batch) -> Batch:
        return {**batch, "image": self.transform.finish(batch["image"])}

    def take_faults(self) -> list[Fault]:
        """Return the faults found since the last call."""
        found, self._faults = self._faults, []
        return found

    def ahead(self, blocks: Sequence[int]) -> None:
        """Prefetch the shards ``blocks``."""
        self._files.ahead(blocks)

    def _usable(self, index: int) -> tuple[Photo | None, int]:
        """Return the photo at ``index``, or its replacement, and the index of the returned sample."""
        try:
            return self._photo(index), index
        except (ValueError, Damaged, Unreachable) as error:
            self._note(index, error)
        return self._stand_in(index)

    def _stand_in(self, index: int) -> tuple[Photo | None, int]:
        if not self.train:
            return None, index
        for step in range(1, min(_STAND_INS + 1, len(self))):
            other = (index + step) % len(self)
            try:
                photo = self._photo(other)
                photo.whole()
            except (ValueError, Damaged, Unreachable) as error:
                self._note(other, error)
            else:
                return photo, other
        raise UserError(
            f"{self.name_of(index)}: this sample and the {_STAND_INS} samples after it are damaged. Prepare the data "
            "set again"
        )

    def _photo(self, index: int) -> Photo:
        content = self._files.read(self._block(index), int(self._offsets[index]), int(self._sizes[index]))
        return Photo(content, self.channels)

    def _note(self, index: int, error: Exception) -> None:
        """Record a fault; without ``skip``, raise it as a UserError."""
        if isinstance(error, UserError):
            # Other errors are not faults of the data: a full disk, for example, would make every sample a fault.
            if not self.skip or not isinstance(error, Damaged | Unreachable):
                raise error
            path = self.paths[self._block(index)]
            self._faults.append(Fault(index, self.name_of(index), str(error).removeprefix(f"{path}: ")))
            return
        if not self.skip:
            raise UserError(
                f"{self.name_of(index)}: the image cannot be decoded ({error}). Replace the image and prepare the data "
                "set again (mmtrain data prepare images --force), or set data.faults=skip to skip damaged samples"
            ) from error
        self._faults.append(Fault(index, self.name_of(index), f"the image cannot be decoded ({error})"))

    def _block(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def name_of(self, index: int) -> str:
        """Return the shard and the key of a sample, for messages."""
        block = self._block(index)
        within = index - (int(self._ends[block - 1]) if block else 0)
        try:
            shard = index_shards([self.paths[block]], skip=self.skip, cache=self.cache)[0]
            key = f"sample {str(shard.keys[within])!r}"
        except (UserError, IndexError):  # the shard was damaged since it was indexed: use the number instead
            logger.debug("%s: cannot read the sample keys", self.paths[block])
            key = f"sample number {within}"
        return f"{self.paths[block]}, {key}"


def read_classes(meta: Path | str) -> list[str] | None:
    """Return the names of the classes in a ``meta.json`` (None: no such file). Raises UserError if it is damaged."""
    try:
        text = _text(meta)
        return None if text is None else [str(name) for name in json.loads(text)["classes"]]
    except Unreachable:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{meta}: cannot be read as JSON with a list "classes" ({error}). Prepare the data set again'
        ) from error


def _text(file: Path | str) -> str | None:
    if isinstance(file, Path):
        return file.read_text(encoding="utf-8") if file.is_file() else None
    try:
        content: bytes = persistently(file, lambda: file_system(file).cat_file(file), _PAUSE)
    except Absent:
        return None
    return content.decode("utf-8")


class ShardFiles:
    """The most recently used shards as open files. Reads name a position, so forked workers can share the files.

    A pickle of this object contains no open files.
    """

    LIMIT = 32

    def __init__(self, shards: Sequence[ShardIndex], cache: ShardCache | None) -> None:
        # The indexes themselves are not kept, because their keys need much memory.
        self.shards = [(shard.path, shard.bytes, shard.changed, shard.digest) for shard in shards]
        self.cache = cache
        self.open: OrderedDict[int, int] = OrderedDict()
        self._ahead: OrderedDict[int, None] = OrderedDict()

    def read(self, block: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of shard number ``block``, from position ``offset``. Raises Damaged or Unreachable."""
        handle = self.open.pop(block, None)
        if handle is None:
            handle = self._opened(block)
            if len(self.open) >= self.LIMIT:
                os.close(self.open.popitem(last=False)[1])
        self.open[block] = handle  # most recently used last
        path = self.shards[block][0]
        try:  # not os_errors, which is too slow to use for every sample
            content = os.pread(handle, size, offset)
        except OSError as error:
            raise Damaged(f"{path}: cannot read the shard ({error.strerror})") from error
        if len(content) != size:
            raise Damaged(f"{path}: the shard was truncated after the run started. Copy or prepare it again")
        return content

    def ahead(self, blocks: Sequence[int]) -> None:
        """Start to fetch the shards ``blocks`` (URLs), or to read them into the page cache (local files)."""
        for block in blocks:
            if block in self._ahead:
                continue
            self._ahead[block] = None
            if len(self._ahead) > 4 * self.LIMIT:
                self._ahead.popitem(last=False)
            path, size, _, digest = self.shards[block]
            if isinstance(path, str):
                assert self.cache is not None
                self.cache.ahead(path, size=size, digest=digest)
                continue
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # the error is raised when the shard is read
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(handle)

    def _opened(self, block: int) -> int:
        path, size, changed, digest = self.shards[block]
        if isinstance(path, str):
            assert self.cache is not None
            with self.cache.open(path, size=size, digest=digest) as stream:
                return os.dup(stream.fileno())
        with os_errors(f"{path}: cannot read the shard", kind=Damaged):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(handle)
        if stat.st_size < size:
            os.close(handle)
            raise Damaged(f"{path}: the shard was truncated after it was indexed. Copy or prepare it again")
        if stat.st_size != size or stat.st_mtime_ns != changed:
            os.close(handle)
            raise Damaged(
                f"{path}: the shard changed after the run started, so its index is no longer valid. Start the run "
                "again, and do not change the data during a run"
            )
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": OrderedDict(), "_ahead": OrderedDict()}

    def __del__(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])
