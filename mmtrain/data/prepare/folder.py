"""An output folder that is complete or does not exist."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtrain.errors import UserError


@contextmanager
def complete_or_absent(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of ``out`` to write into; renamed to ``out`` at the end, removed on any error.

    ``force`` replaces what is there, at the very end. A process that is killed leaves its sibling behind; the next one
    on this machine sweeps it away.
    """
    out = out.absolute()
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not force:
        raise UserError(f"{out}: exists and is not a finished dataset; give another --out, or --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        part = out.with_name(f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
        part.mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    try:
        yield part
        _replace(part, out)
    except OSError as error:
        # What the source cannot give is reported where it is read; what is left is the target, above all a full disk.
        raise UserError(f"{out}: writing failed ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace(part: Path, out: Path) -> None:
    old = None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        old = out.with_name(f".{out.name}.old-{uuid.uuid4().hex}")
        out.rename(old)
    os.replace(part, out)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _sweep(out: Path) -> None:
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    for left in out.parent.glob(f"{prefix}*"):
        pid = left.name[len(prefix) :]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
