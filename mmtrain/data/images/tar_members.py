"""The members of a tar shard, read so that no damaged or hostile header can do more than be refused.

Python's tarfile believes what a header claims: it allocates a claimed length before it reads, follows chains of headers
as deep as they go, and raises whatever a wrong number leads to. Here every length is held to the file's, and all of
that becomes ``Damaged``.
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
#: The longest header (a long name, attributes) that is read, in bytes.
_MOST_HEADER = 1 << 16
#: The longest name of a member, in characters: the array of all keys is at most four times as large as the shard then.
_MOST_NAME = 1024
#: No name has so many digits in a row. tarfile's patterns take the square of their number.
_DIGITS = re.compile(rb"\d{256}")
#: What tarfile raises for wrong numbers and names, its own errors aside.
_RAISED = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class Damaged(UserError):
    """A shard that cannot be used as it is."""


class _Headers:
    """The file as tarfile reads it, which is headers alone: no piece is longer than a header may be."""

    def __init__(self, stream: BinaryIO) -> None:
        self._read, self.seek, self.tell = stream.read, stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        header = self._read(size)
        if size > tarfile.BLOCKSIZE and _DIGITS.search(header):
            raise tarfile.ReadError("a header holds a number without end")
        return header


def open_shard(shard: Path | str) -> BufferedReader:
    """The file, open. Raises Damaged."""
    with os_errors(f"{shard}: cannot read the shard", kind=Damaged):
        return open(shard, "rb")


def read_members(
    shard: Path | str, stream: BinaryIO, damaged: Callable[[str], None] | None = None
) -> Iterator[tarfile.TarInfo]:
    """The regular files of the uncompressed tar ``stream``, in order. Each lies whole within it, in one piece.

    ``damaged`` is told of a member that is not given, in a message that names ``shard`` (None: it is raised). Raises
    Damaged where the archive cannot be read on, with the last member that was whole.
    """
    tell = damaged or _refuse
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    last = ""
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as archive:  # type: ignore[call-overload]
            before = -1
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile keeps every header otherwise
                if not before < archive.offset or member.size < 0 or member.offset_data < 0:
                    raise tarfile.ReadError("a member ends before it begins")
                before = archive.offset
                if fault := _fault(member):
                    tell(f"{shard}: member {_short(member.name)} {fault}; {CURE_SHARD}")
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
        what = "is empty" if size == 0 else f"is truncated, damaged or not an uncompressed tar ({_said(error)})"
        after = f"after the member {_short(last)} the shard" if last else "the shard"
        raise Damaged(f"{shard}: {after} {what}; {CURE_SHARD}") from error
    _check_end(shard, stream, size, end)


def _refuse(message: str) -> None:
    raise Damaged(message)


def _fault(member: tarfile.TarInfo) -> str:
    """Why a member is not used, whatever it holds."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return (
            "points outside of the archive. Nothing is ever extracted, but no tool for shards writes such names: check "
            "where the file comes from"
        )
    if len(member.name) > _MOST_NAME:
        return f"has a name of {len(member.name)} characters, more than {_MOST_NAME}"
    return "is stored sparse, with its holes left out" if member.issparse() else ""


def _said(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "headers follow headers without end"
    return str(error) if isinstance(error, tarfile.TarError) else f"{type(error).__name__}: {str(error)[:100]}"


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "...")


def _check_end(shard: Path | str, stream: BinaryIO, size: int, offset: int) -> None:
    """tarfile takes a damaged or missing header after the first member for the end of the archive; we do not."""
    if size - offset < tarfile.BLOCKSIZE:
        raise Damaged(f"{shard}: the shard is truncated: its end-of-archive mark is missing; {CURE_SHARD}")
    stream.seek(offset)
    while chunk := stream.read(1 << 20):
        if chunk.strip(b"\0"):
            raise Damaged(
                f"{shard}: byte {offset} is followed by data that is no tar member (damaged, or several tars joined "
                f"into one file); {CURE_SHARD}"
            )
