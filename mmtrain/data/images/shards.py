"""Which shards a path, a pattern or an address means, and reading pieces of them by position."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.data.images.cache import ShardCache, Unreachable, file_system, said
from mmtrain.data.images.tar_index import Damaged, ShardIndex
from mmtrain.errors import UserError, nearest

_HOW = (
    "make one with: mmtrain data prepare images --root IMAGES --out {out} (or: mmtrain data prepare digits --out ...)"
)

Shard = Path | str  # a str is an address


def is_address(path: object) -> bool:
    """Whether ``path`` is read through fsspec (``https://...``, ``s3://...``) and not from a file system here."""
    return isinstance(path, str) and "://" in path


def find_shards(path: str | Path | Sequence[str | Path], *, missing: bool = False) -> list[Shard]:
    """Tar shards of a folder (``*.tar``, sorted), of a brace pattern ``shard-{000000..000003}.tar``, or of a list.

    A pattern may name folders too (``{part1,part2}``), and all of it may be addresses. ``missing``: shards that are
    named but not there are given all the same.
    """
    if not isinstance(path, str | Path):
        return [shard for part in path for shard in find_shards(part, missing=missing)]
    text = os.path.expanduser(str(path))
    if "{" in text:
        from braceexpand import braceexpand

        try:
            parts = list(braceexpand(text))
        except ValueError as error:
            raise UserError(f"{text}: not a brace pattern ({error}); write shard-{{000000..000003}}.tar") from error
        return _all_there(text, [shard for part in parts for shard in _expanded(part)], missing)
    return _all_there(text, _expanded(text), missing)


def _expanded(text: str) -> list[Shard]:
    if is_address(text):
        return [text] if text.endswith(".tar") else list(_listed(text))
    folder = Path(text)
    if not folder.is_dir():
        return [folder]
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{text}: no *.tar shards in this folder{_splits(folder)}; {_how(folder)}")
    return list(shards)


def _listed(address: str) -> list[str]:
    """The shards below an address, where its storage can list them."""
    system = file_system(address)
    try:
        found = system.glob(address.rstrip("/") + "/*.tar")
    except Exception as error:  # each kind of storage has its own
        raise Unreachable(
            f"{address}: cannot be listed ({said(error)}); name its shards: shard-{{000..099}}.tar"
        ) from error
    if not found:
        raise UserError(
            f"{address}: no *.tar shards are listed there; name them: {address}/shard-{{000000..000003}}.tar"
        )
    return sorted(system.unstrip_protocol(name) for name in found)


def _all_there(text: str, shards: list[Shard], missing: bool) -> list[Shard]:
    gone = [shard for shard in shards if isinstance(shard, Path) and not shard.is_file()]
    if not gone or (missing and len(gone) < len(shards)):
        return shards
    what = "no such folder or shard" if len(shards) == 1 else f"{len(gone)} of {len(shards)} shards are missing"
    here = Path.cwd() / gone[0]
    hint = nearest(here.name, _names(here.parent))
    raise UserError(f"{text}: {what} (looked for {here}){hint}; {_how(gone[0])}")


def _how(path: Path) -> str:
    return _HOW.format(out=path.parent if path.suffix != ".tar" else path.parent.parent)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _splits(folder: Path) -> str:
    found = sorted({shard.parent.name for shard in folder.glob("*/*.tar")})
    return f" (there are some in its folders {', '.join(found)}: give one of them)" if found else ""


class ShardFiles:
    """Open files of the shards in use. Reads by position, so forked workers can share them; a pickle holds none."""

    LIMIT = 32

    def __init__(self, shards: Sequence[ShardIndex], cache: ShardCache | None) -> None:
        # not the indexes themselves: their keys are long
        self.shards = [(shard.path, shard.bytes, shard.changed, shard.digest) for shard in shards]
        self.cache = cache
        self.open: OrderedDict[int, int] = OrderedDict()
        self._ahead: OrderedDict[int, None] = OrderedDict()

    def read(self, block: int, offset: int, size: int) -> bytes:
        """``size`` bytes of shard number ``block``. Raises Damaged or Unreachable."""
        handle = self.open.pop(block, None)
        if handle is None:
            handle = self._opened(block)
            if len(self.open) >= self.LIMIT:
                os.close(self.open.popitem(last=False)[1])
        self.open[block] = handle  # most recently used last
        path = self.shards[block][0]
        try:
            content = os.pread(handle, size, offset)
        except OSError as error:
            raise Damaged(f"{path}: cannot read the shard ({error.strerror})") from error
        if len(content) != size:
            raise Damaged(f"{path}: the shard was cut short after the run started; copy or prepare it again")
        return content

    def ahead(self, blocks: Sequence[int]) -> None:
        """These shards are wanted soon: begin to fetch them, or to read them into the page cache."""
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
                continue  # said when it is read
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(handle)

    def _opened(self, block: int) -> int:
        path, size, changed, digest = self.shards[block]
        if isinstance(path, str):
            assert self.cache is not None
            with self.cache.open(path, size=size, digest=digest) as stream:
                return os.dup(stream.fileno())
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Damaged(f"{path}: cannot read the shard ({error.strerror})") from error
        stat = os.fstat(handle)
        if stat.st_size < size:
            os.close(handle)
            raise Damaged(f"{path}: the shard was cut short after it was indexed; copy or prepare it again")
        if stat.st_size != size or stat.st_mtime_ns != changed:
            os.close(handle)
            raise Damaged(
                f"{path}: the shard changed after the run started: its index no longer fits. Start the run again, and"
                " do not touch the data of one that runs"
            )
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": OrderedDict(), "_ahead": OrderedDict()}

    def __del__(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])
