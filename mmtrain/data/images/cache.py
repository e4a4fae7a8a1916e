"""Local cache of remote shards. Each file is fetched once for all processes, as a whole, up to a size limit.

Every kind of URL that fsspec supports works: ``https://``, ``s3://`` (with s3fs), ``gs://`` (with gcsfs), ``file://``
and others.
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
#: Largest accepted file of unknown size, in bytes. The limit of the cache replaces it if that is larger.
_UNTOLD = 1 << 30
#: Timeouts of an attempt, in seconds: to connect, and between two pieces of data.
_CONNECT, _SILENCE = 20.0, 60.0


def is_address(path: object) -> bool:
    """Return whether ``path`` is a URL (``https://...``, ``s3://...``), which is read through fsspec."""
    return isinstance(path, str) and "://" in path


class ShardCache:
    """A folder of fetched files.

    Args:
        folder: best on a local disk of the node. All ranks of a node share it.
        limit: maximum size in bytes. The least recently used files are removed first; open files stay readable.
        pause: seconds before the second attempt. The pause doubles for each further attempt, or is as long as the
            server requests.
    """

    def __init__(self, folder: Path, limit: int, pause: float = 1.0) -> None:
        self.folder, self.limit, self.pause = folder, limit, pause
        self._ahead: SimpleQueue[tuple[str, int | None, str]] | None = None
        self._requested: set[str] = set()
        self._owner = os.getpid()

    def place(self, address: str) -> Path:
        """Return the path in the cache for the file at ``address``."""
        name = re.sub(r"[^\w.-]", "_", address.rpartition("/")[2])[-80:]
        return self.folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"

    def fetch(self, address: str, *, size: int | None = None, digest: str = "", fresh: bool = False) -> Path:
        """Return the local copy of a file, fetching it if it is not in the cache.

        Args:
            size: expected size in bytes (None: unknown).
            digest: expected SHA-256 ("": unknown).
            fresh: fetch the file even if it is in the cache.

        Raises:
            Unreachable: if the file cannot be fetched.
        """
        target = self.place(address)
        if not fresh and self._good(target, size):
            return target
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(target.name + ".lock"), wait=True, tell=False):
            if fresh or not self._good(target, size):  # another process may have fetched it in the meantime
                self._download(address, target, size, digest)
        self._make_room(target)
        return target

    def open(self, address: str, *, size: int | None = None, digest: str = "", fresh: bool = False) -> BufferedReader:
        """Return the local copy of a file, open for reading. It stays readable if the cache removes it."""
        for _ in range(ATTEMPTS):
            local = self.fetch(address, size=size, digest=digest, fresh=fresh)
            with suppress(FileNotFoundError):  # another process or thread removed it to free space
                return open(local, "rb")
        raise Unreachable(
            f"{address}: is removed from {self.folder} as soon as it is fetched. The limit of {self.limit / 1e9:g} GB "
            "is too small for the shards that are read at the same time. Increase data.cache_gb"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_requested": set()}

    def ahead(self, address: str, *, size: int | None = None, digest: str = "") -> None:
        """Start to fetch a file in the background. Errors are ignored here; ``fetch`` raises them later."""
        if self._owner != os.getpid() or self._ahead is None:  # threads do not survive a fork
            self._ahead, self._requested, self._owner = SimpleQueue(), set(), os.getpid()
            # A daemon thread, so that the process does not wait for it at exit.
            threading.Thread(target=self._fetch_quietly, args=(self._ahead,), name="mmtrain-ahead", daemon=True).start()
        if address in self._requested and self.place(address).exists():
            return
        self._requested.add(address)
        self._ahead.put((address, size, digest))

    def _fetch_quietly(self, requests: SimpleQueue[tuple[str, int | None, str]]) -> None:
        while True:
            address, size, digest = requests.get()
            with suppress(UserError, OSError):
                self.fetch(address, size=size, digest=digest)

    def size(self, address: str) -> int | None:
        """Return the size of the file at ``address`` in bytes (None: unknown). Raises Unreachable."""
        found = persistently(address, lambda: file_system(address).info(address), self.pause).get("size")
        return int(found) if found is not None else None

    def _good(self, target: Path, size: int | None) -> bool:
        try:
            found = target.stat().st_size
            os.utime(target)  # mark it as used now
        except OSError:
            return False
        return size is None or found == size

    def _download(self, address: str, target: Path, size: int | None, digest: str) -> None:
        part = target.with_name(target.name + ".part")

        def attempt() -> None:
            try:
                got, found = self._copy(address, part, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # a local error, not one of the network
                    with self._written():
                        raise
                raise
            if size is not None and got != size:
                raise OSError(f"received {'more' if got > size else got} bytes, but its index says {size}")
            if digest and found != digest:
                raise OSError("its SHA-256 differs from the one in its index")

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
        """Copy the file at ``address`` to ``part``; return its number of bytes and its SHA-256.

        Reading stops after ``size`` or the announced length, even if the server sends more.
        """
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
                f"{address}: the server announces no size and sends more than {most / 1e9:g} GB. Increase data.cache_gb"
                " if the file is this large"
            )
        if isinstance(expected, int) and got != expected:
            raise OSError(f"received {got} of {expected} bytes")
        return got, digest.hexdigest()

    def _make_room(self, kept: Path) -> None:
        """Remove the least recently used files until the limit is met, but never ``kept``."""
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
    """Return the cache in ``folder`` (None: ``~/.cache/mmtrain/shards``), limited to ``gigabytes`` (10^9 bytes)."""
    path = Path(folder).expanduser() if folder else Path.home() / ".cache/mmtrain/shards"
    return ShardCache(path, int(gigabytes * 1e9))


_systems = threading.local()


def file_system(address: str) -> Any:
    """Return the fsspec file system of a URL; each process and thread has its own.

    Raises:
        UserError: if a package is missing or the scheme is unknown.
    """
    try:
        import fsspec
    except ImportError as error:
        raise UserError(f"{address}: URLs need the package fsspec. Run pip install 'mmtrain[remote]'") from error
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
            f"{address}: reading {scheme}:// needs a package that is not installed ({error}). Install it with pip:"
            " 'mmtrain[remote]' for http and https, s3fs for s3, gcsfs for gs"
        ) from error
    except ValueError as error:
        raise UserError(f"{address}: {error}") from error
    return known[scheme]
