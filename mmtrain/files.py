"""Small files: writes that a kill or a power cut cannot tear, lock files, and files of JSON objects, one per line.

Files of JSON lines are appended to by processes that may be killed at any time, so a reader skips torn lines.
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
    """Yield a temporary name beside ``path``, with its suffix, for a file or folder to be made.

    What was made becomes ``path`` when the block ends, and replaces a file there; after an error it is deleted. The
    name is that of one process of one host, so that several may make the same file: the last rename wins.
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
    """Yield a temporary name as :func:`complete_or_absent` does, for a new file or folder that a user has named.

    Raises:
        UserError: when ``path`` exists, or cannot be written.
    """
    _refuse_existing(path)
    with os_errors(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as partial:
            yield partial
            _refuse_existing(path)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another name (--out), or remove it first")


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, which holds the old or the new content at any time.

    Args:
        durable: return only when the content and the rename outlast a power cut.
    """
    with complete_or_absent(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            sync(partial)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file or folder durable. A rename is durable once its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive(path: Path, *, wait: bool, tell: bool = True) -> Iterator[None]:
    """Hold the lock file ``path``, which exists only while it is held, against other processes and threads.

    It is an ``flock``: the kernel releases it when the process ends, however that happens, and over NFS it excludes
    other hosts too. ``wait``: until it is free (``tell``: and say so); otherwise BlockingIOError is raised if another
    holds it. Raises UserError where files cannot be locked.
    """
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a process that is killed
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            if not wait:
                raise BlockingIOError(f"{path}: another process holds it") from error
            if tell:
                logger.info("%s: waiting for another process", path)
            lock.acquire()
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written or locked ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: FileLock tries again where the file it has locked is gone
        lock.release()


def read_json(path: Path, cure: str, *, kind: type[UserError] = UserError) -> dict[str, Any]:
    """The object in the JSON file ``path``.

    Raises:
        UserError (or ``kind``): when the file cannot be read or holds no object; the message ends with ``cure``.
    """
    with os_errors(f"{path} cannot be read", cure, kind=kind):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is damaged: it is no JSON ({str(error)[:100]}); {cure}") from None
    if not isinstance(found, dict):
        raise kind(f"{path} is damaged: it holds no JSON object; {cure}")
    return found


def parse_json_line(text: str) -> dict[str, Any] | None:
    """The object in a line, or None where the line is torn or holds no object."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in ``file``, oldest first, without torn lines. Empty if there is no such file."""
    try:
        texts = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for text in texts if (line := parse_json_line(text)) is not None]


def append_json_line(file: Path, line: dict[str, Any]) -> None:
    """Append ``line`` durably, with one write in append mode, so that lines of several processes do not mix.

    It begins a new line where a kill has cut the last one short.
    """
    with open(file, "ab+", buffering=0) as stream:
        torn = False
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"
        stream.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        os.fsync(stream.fileno())
