"""Shards that lie elsewhere, kept on this machine: whole files, each fetched once for all processes, up to a limit.

Any address that fsspec knows will do: ``https://``, ``s3://`` (with s3fs), ``gs://`` (with gcsfs), ``file://``, ...
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from contextlib import AbstractContextManager, suppress
from io import BufferedReader
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mmtrain.data.core.retry import ATTEMPTS, Unreachable, persistently
from mmtrain.errors import UserError, os_errors
from mmtrain.files import exclusive

_PIECE = 1 << 20
#: Bytes of a file whose length nobody tells, at least; more only if the cache may hold more.
_UNTOLD = 1 << 30
#: Seconds to connect, and without a byte, after which an attempt is given up.
_CONNECT, _SILENCE = 20.0, 60.0


def is_address(path: object) -> bool:
    """Whether ``path`` is read through fsspec (``https://...``, ``s3://...``) and not from a file system here."""
    return isinstance(path, str) and "://" in path


class ShardCache:
    """A folder of fetched files.

    Args:
        folder: best on the node's own disk; all ranks of a node share it.
        limit: bytes kept; those used longest ago go first. What is open stays readable.
        pause: seconds before the second attempt; each further one waits twice as long, or as long as the server asks.
    """

    def __init__(self, folder: Path, limit: int, pause: float = 1.0) -> None:
        self.folder, self.limit, self.pause = folder, limit, pause
        self._ahead: SimpleQueue[tuple[str, int | None, str]] | None = None
        self._asked: set[str] = set()
        self._owner = os.getpid()

    def place(self, address: str) -> Path:
        """Where the file of ``address`` is or would be."""
        name = re.sub(r"[^\w.-]", "_", address.rpartition("/")[2])[-80:]
        return self.folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"

    def fetch(self, address: str, *, size: int | None = None, digest: str = "", fresh: bool = False) -> Path:
        """The local file, which is fetched if it is not there (or ``fresh`` is wanted). Raises Unreachable.

        ``size`` and ``digest`` (SHA-256): what it must have; "" and None: not known.
        """
        target = self.place(address)
        if not fresh and self._good(target, size):
            return target
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(target.name + ".lock"), wait=True, tell=False):
            if fresh or not self._good(target, size):  # another process may have fetched it meanwhile
                self._download(address, target, size, digest)
        self._make_room(target)
        return target

    def open(self, address: str, *, size: int | None = None, digest: str = "", fresh: bool = False) -> BufferedReader:
        """The local file of ``fetch``, open: what is removed to make room stays readable."""
        for _ in range(ATTEMPTS):
            local = self.fetch(address, size=size, digest=digest, fresh=fresh)
            with suppress(FileNotFoundError):  # another process or thread has made room meanwhile
                return open(local, "rb")
        raise Unreachable(
            f"{address}: is removed from {self.folder} as soon as it is there: the limit of {self.limit / 1e9:g} GB is "
            "too small for the shards that are read at once; raise data.cache_gb"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_asked": set()}

    def ahead(self, address: str, *, size: int | None = None, digest: str = "") -> None:
        """Begin to fetch, in the background; what goes wrong is said when the file is wanted."""
        if self._owner != os.getpid() or self._ahead is None:  # threads do not survive a fork
            self._ahead, self._asked, self._owner = SimpleQueue(), set(), os.getpid()
            # daemon: the end of the process waits for no fetch
            threading.Thread(target=self._fetch_quietly, args=(self._ahead,), name="mmtrain-ahead", daemon=True).start()
        if address in self._asked and self.place(address).exists():
            return
        self._asked.add(address)
        self._ahead.put((address, size, digest))

    def _fetch_quietly(self, wanted: SimpleQueue[tuple[str, int | None, str]]) -> None:
        while True:
            address, size, digest = wanted.get()
            with suppress(UserError, OSError):
                self.fetch(address, size=size, digest=digest)

    def size(self, address: str) -> int | None:
        """Bytes behind ``address``; None where that is not told. Raises Unreachable."""
        found = persistently(address, lambda: file_system(address).info(address), self.pause).get("size")
        return int(found) if found is not None else None

    def _good(self, target: Path, size: int | None) -> bool:
        try:
            found = target.stat().st_size
            os.utime(target)  # used last now
        except OSError:
            return False
        return size is None or found == size

    def _download(self, address: str, target: Path, size: int | None, digest: str) -> None:
        part = target.with_name(target.name + ".part")

        def attempt() -> None:
            try:
                got, found = self._copy(address, part, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # ours, not the network's
                    with self._written():
                        raise
                raise
            if size is not None and got != size:
                raise OSError(f"{'more' if got > size else got} bytes came, {size} were indexed")
            if digest and found != digest:
                raise OSError("its content is not what was indexed (SHA-256)")

        try:
            persistently(address, attempt, self.pause)
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise

    def _written(self) -> AbstractContextManager[None]:
        return os_errors(f"data.cache={self.folder}: cannot be written")

    def _copy(self, address: str, part: Path, size: int | None) -> tuple[int, str]:
        """Bytes and SHA-256 of what came, which is not waited for beyond ``size`` or the length that was announced."""
        digest, got = hashlib.sha256(), 0
        with self._written():
            part.touch()
        with file_system(address).open(address, "rb") as source, open(part, "wb") as target:
            expected = getattr(source, "size", None)
            most = next((known for known in (size, expected) if known is not None), max(self.limit, _UNTOLD))
            while got <= most and (piece := source.read(_PIECE)):
                digest.update(piece)
                got += target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        if size is None and expected is None and got > most:
            raise Unreachable(
                f"{address}: sends more than the {most / 1e9:g} GB of data.cache_gb, without telling how much"
            )
        if isinstance(expected, int) and got != expected:
            raise OSError(f"{got} of {expected} bytes came")
        return got, digest.hexdigest()

    def _make_room(self, kept: Path) -> None:
        """Remove what was used longest ago, beyond the limit."""
        with exclusive(self.folder / "room.lock", wait=True, tell=False):
            files = []
            for path in self.folder.iterdir():
                if path.suffix in (".lock", ".part", ".idx"):
                    continue
                with suppress(OSError):
                    stat = path.stat()
                    files.append((stat.st_mtime_ns, stat.st_size, path))
            excess = sum(size for _, size, _ in files) - self.limit
            for _, size, path in sorted(files):
                if excess <= 0:
                    break
                if path != kept:
                    with suppress(OSError):
                        path.unlink()
                    excess -= size


def default_cache(folder: str | None = None, gigabytes: float = 200.0) -> ShardCache:
    """The cache of this user on this node, or that in ``folder``."""
    where = Path(folder).expanduser() if folder else Path.home() / ".cache/mmtrain/shards"
    return ShardCache(where, int(gigabytes * 1e9))


_systems = threading.local()


def file_system(address: str) -> Any:
    """fsspec's file system of an address, one for each process and thread."""
    try:
        import fsspec
    except ImportError as error:
        raise UserError(f"{address}: addresses need fsspec: pip install 'mmtrain[remote]'") from error
    scheme = address.partition("://")[0]
    if getattr(_systems, "process", None) != os.getpid():
        _systems.process, _systems.known = os.getpid(), {}
    known: dict[str, Any] = _systems.known
    if scheme in known:
        return known[scheme]
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, connect=_CONNECT, sock_read=_SILENCE)
            options = {"client_kwargs": {"timeout": limits, "trust_env": True}, "block_size": 0}
        known[scheme] = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise UserError(
            f"{address}: reading {scheme}:// needs a package that is not here ({error}): pip install 'mmtrain[remote]'"
            " for http and https, s3fs for s3, gcsfs for gs"
        ) from error
    except ValueError as error:
        raise UserError(f"{address}: {error}") from error
    return known[scheme]
