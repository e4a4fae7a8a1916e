"""One process at a time, on this machine and on any other that shares the folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmtrain.errors import UserError

logger = logging.getLogger("mmtrain")


@contextmanager
def exclusive(path: Path, *, wait: bool, tell: bool = True) -> Iterator[None]:
    """Hold the lock file ``path``, which is there only as long as it is held, against other processes and threads.

    The kernel lets go of it when the process ends, however that happens. ``wait``: until it is free (``tell``: and say
    so); otherwise BlockingIOError is raised if another holds it. Raises UserError where files cannot be locked.
    """
    handle = _acquire(path, wait, tell)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who opened it before finds out in _acquire
        os.close(handle)


def _acquire(path: Path, wait: bool, tell: bool) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if tell:
                    logger.info("%s: waiting for another process", path)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            raise UserError(f"{path}: files cannot be locked here ({error.strerror}); choose another folder") from error
        os.close(handle)  # the one before us has removed the file: lock the one that is there now


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
