"""Safe reading of the members of a tar shard. A damaged or hostile header can only raise ``Damaged``.

Python's tarfile trusts the headers: it allocates a claimed length before it reads, follows chains of headers to any
depth, and raises many kinds of exceptions for wrong numbers. Here, every length is checked against the size of the
file, and every such exception becomes ``Damaged``.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from mmtrain.errors import UserError, os_errors

CURE_SHARD = "copy or prepare the shard again (mmtrain data prepare images --force)"
#: Maximum size of a header (including long names and attributes) that is read, in bytes.
_MOST_HEADER = 1 << 16
#: Maximum length of a member's name, in characters. It limits the array of all keys to four times the shard's size.
_MOST_NAME = 1024
#: Too many consecutive digits. The time of tarfile's regular expressions is quadratic in the number of digits.
_DIGITS = re.compile(rb"\d{256}")
#: Exceptions that tarfile raises for wrong numbers and names, in addition to its own.
_RAISED = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class Damaged(UserError):
    """A shard that cannot be used as it is."""


class _Headers:
    """File object for tarfile that reads headers only, and rejects any that are longer than ``_MOST_HEADER``."""

    def __init__(self, stream: BinaryIO) -> None:
        self._read, self.seek, self.tell = stream.read, stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        header = self._read(size)
        if size > tarfile.BLOCKSIZE and _DIGITS.search(header):
            raise tarfile.ReadError("a header contains a number with too many digits")
        return header


def open_shard(shard: Path | str) -> BufferedReader:
    """Open a shard for reading. Raises Damaged."""
    with os_errors(f"{shard}: cannot read the shard", kind=Damaged):
        return open(shard, "rb")


def read_members(
    shard: Path | str, stream: BinaryIO, damaged: Callable[[str], None] | None = None
) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an uncompressed tar, in order. Each one is complete and contiguous in the file.

    Args:
        shard: name of the shard, for messages.
        stream: the open shard.
        damaged: called with a message for each member that is skipped (None: raise Damaged instead).

    Raises:
        Damaged: if the rest of the archive cannot be read. The message names the last complete member.
    """
    report = damaged or _refuse
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    last = ""
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as archive:  # type: ignore[call-overload]
            before = -1
            while (member := archive.next()) is not None:
                archive.members = []  # otherwise tarfile keeps every header in memory
                if not before < archive.offset or member.size < 0 or member.offset_data < 0:
                    raise tarfile.ReadError("a member ends before it begins")
                before = archive.offset
                if fault := _fault(member):
                    report(f"{shard}: member {_short(member.name)} {fault}; {CURE_SHARD}")
                elif member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"it ends within {_short(member.name)}")
                    last = member.name
                    yield member
            end = archive.offset
    except Damaged:
        raise
    except OSError as error:
        raise Damaged(f"{shard}: cannot read the shard ({error.strerror or error})") from error
    except (tarfile.TarError, *_RAISED) as error:
        what = "is empty" if size == 0 else f"is truncated, damaged or not an uncompressed tar ({_reason(error)})"
        after = f"after the member {_short(last)} the shard" if last else "the shard"
        raise Damaged(f"{shard}: {after} {what}; {CURE_SHARD}") from error
    _check_end(shard, stream, size, end)


def _refuse(message: str) -> None:
    raise Damaged(message)


def _fault(member: tarfile.TarInfo) -> str:
    """Return why a member must be rejected because of its header ("": it is valid)."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return (
            "has a path outside of the archive. mmtrain never extracts members, but no tool for shards writes such "
            "names: check the origin of the file"
        )
    if len(member.name) > _MOST_NAME:
        return f"has a name of {len(member.name)} characters, more than the limit of {_MOST_NAME}"
    return "is stored as a sparse file, which is not supported" if member.issparse() else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "its headers are nested too deeply"
    return str(error) if isinstance(error, tarfile.TarError) else f"{type(error).__name__}: {str(error)[:100]}"


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "...")


def _check_end(shard: Path | str, stream: BinaryIO, size: int, offset: int) -> None:
    """Raise Damaged unless the archive ends with zeros from ``offset`` on.

    tarfile treats a damaged or missing header after the first member as the end of the archive.
    """
    if size - offset < tarfile.BLOCKSIZE:
        raise Damaged(f"{shard}: the shard is truncated: its end-of-archive mark is missing; {CURE_SHARD}")
    stream.seek(offset)
    while chunk := stream.read(1 << 20):
        if chunk.strip(b"\0"):
            raise Damaged(
                f"{shard}: the data after byte {offset} is not a tar member (the shard is damaged, or several tar files"
                f" were joined); {CURE_SHARD}"
            )
