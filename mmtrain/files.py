"""Small files: atomic writes, lock files, JSON files and JSON-lines files.

A process that appends to a JSON-lines file may be killed while it writes, so readers skip incomplete lines.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmtrain.errors import UserError, os_errors
from mmtrain.log import logger


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, at which the caller creates a file or folder.

    When the block ends, it is renamed to ``path`` and replaces an existing file. After an error it is deleted. The
    temporary name contains the host and the process id, so several processes may write the same file at once; the
    last rename wins.
    """
    partial = path.with_name(f".{path.stem}.{os.uname().nodename}-{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Like :func:`complete_or_absent`, for an output path chosen by the user, which must not exist yet.

    Raises:
        UserError: if ``path`` exists or cannot be written.
    """
    _refuse_existing(path)
    with os_errors(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as partial:
            yield partial
            _refuse_existing(path)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} already exists: choose another name (--out), or remove it first")


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write ``content`` to ``path``. At any time the file has either its old or its new content.

    Args:
        content: text is encoded as UTF-8.
        durable: return only when the new content is safe from a power failure (fsync).
    """
    with complete_or_absent(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            sync(partial)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync). A rename is durable after its folder has been flushed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive(path: Path, *, wait: bool, tell: bool = True) -> Iterator[None]:
    """Hold the lock file ``path`` during the block. It excludes other processes and threads, and is deleted afterwards.

    The lock is an ``flock``: the kernel releases it when the process ends for any reason. Over NFS it also excludes
    other hosts.

    Args:
        wait: wait until the lock is free.
        tell: log that the process waits.

    Raises:
        BlockingIOError: if another process holds the lock and ``wait`` is false.
        UserError: if the file system cannot lock files.
    """
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would remain after a killed process
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            if not wait:
                raise BlockingIOError(f"{path}: another process holds this lock") from error
            if tell:
                logger.info("%s: waiting for another process to release this lock", path)
            lock.acquire()
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written or locked ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the release: FileLock retries if the file that it has locked was deleted
        lock.release()


def read_json(path: Path, cure: str, *, kind: type[UserError] = UserError) -> dict[str, Any]:
    """Return the object in the JSON file ``path``.

    Args:
        cure: the end of error messages.
        kind: the class of errors.

    Raises:
        UserError: (or ``kind``) if the file cannot be read or does not contain a JSON object.
    """
    with os_errors(f"{path} cannot be read", cure, kind=kind):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is damaged: it is not valid JSON ({str(error)[:100]}); {cure}") from None
    if not isinstance(found, dict):
        raise kind(f"{path} is damaged: it does not contain a JSON object; {cure}")
    return found


def parse_json_line(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a line, or None if the line is incomplete or contains no object."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects in ``file``, oldest first; [] if the file does not exist. Incomplete lines are skipped."""
    try:
        texts = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for text in texts if (line := parse_json_line(text)) is not None]


def append_json_line(file: Path, line: dict[str, Any]) -> None:
    """Append ``line`` to ``file`` durably.

    It is a single write in append mode, so lines of several processes do not interleave. If the last line of the file
    is incomplete, a newline is written first.
    """
    with open(file, "ab+", buffering=0) as stream:
        torn = False
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"
        stream.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        os.fsync(stream.fileno())
