"""Detect the format of a CSV file: encoding, field separator, decimal mark and column names.

The number of fields is checked in every row.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

from mmtrain.errors import UserError
from mmtrain.log import logger

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
DECIMALS = {"point": ".", "comma": ","}
UNNAMED = "Unnamed: "
_LONGEST_HEADER = 1 << 26
_BLOCK = 1 << 22
_SAMPLE = 200
#: A quoted field longer than this makes the fast check of all rows give up; the rows are then parsed one by one.
_LONGEST_FIELD = 1 << 24
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: First bytes of files that are not CSV, with the format and the cure for the error message.
_OTHERS = {
    b"PK\3\4": "a zip archive or an Excel workbook: rename an archive to .zip, save a workbook as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save it as CSV",
    b"PAR1": "a parquet file: rename it to .parquet",
    b"\x1f\x8b": "compressed with gzip: rename it to .csv.gz",
    b"<!DOCTYPE": "a web page, not a table: download the table itself",
    b"<html": "a web page, not a table: download the table itself",
    b"version https://git-lfs": "a Git LFS pointer: download the file with git lfs pull",
}
#: Bytes that Windows-1252 does not define.
_NO_LETTERS = b"\x81\x8d\x8f\x90\x9d"
_DATE = re.compile(r"\d{1,4}[-/.]\d")
_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_POINT = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
#: Empty lines before the header.
_LEADING = re.compile(r"(?: *(?:\r\n|\n|\r))*")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+\.\d+|[+-]?\d{1,3}(?:,\d{3}){2,}")


@dataclass(frozen=True)
class Dialect:
    """The format of a CSV file."""

    encoding: str
    separator: str
    decimal: str
    names: tuple[str, ...]  # unique; a column without a name gets its position from 0, such as "Unnamed: 0"
    header_lines: int  # number of lines up to the end of the header
    literal: bool  # whether the header contains exactly ``names``


def examine(stream: BinaryIO, where: str, separator: str | None = None, decimal: str | None = None) -> Dialect:
    """Detect the format of a CSV file by reading all of it.

    Args:
        stream: a seekable stream. On return it is at its start.
        where: name of the file for messages.
        separator, decimal: a character, or a name in ``SEPARATORS`` or ``DECIMALS``; None detects it from the first
            rows.

    Raises:
        UserError: if the stream is not text, if its format is ambiguous, or if a row has a different number of fields
            than the header.
    """
    if separator is not None:
        separator = SEPARATORS.get(separator.strip().lower(), separator)
        if len(separator) != 1 or not separator.isascii() or separator in '"\r\n' or separator.isalnum():
            raise UserError(
                f"data.separator={separator!r}: must be one character such as ; or one of {', '.join(SEPARATORS)}"
            )
    if decimal is not None:
        decimal = DECIMALS.get(decimal, decimal)
        if decimal not in DECIMALS.values():
            raise UserError(f"data.decimal={decimal!r}: must be one of {', '.join(DECIMALS)}")
    encoding = _encoding(stream, where)
    sample = _sample(stream, encoding, where)
    if not sample.strip():
        raise UserError(f"{where}: cannot be read as a table (the file is empty)")
    mark = separator or _separator(sample, where)
    header, lines = _header(sample, mark, where)
    point = decimal or _decimal(sample, mark, where)
    if mark == point:
        raise UserError(
            f"{where}: {mark!r} cannot be both the field separator and the decimal mark; set data.separator and "
            "data.decimal to different characters"
        )
    names = _unique(header)
    _question(header, where)
    if _uneven(_blocks(stream, encoding), mark, b"\n" if "\n" in sample else b"\r", len(names)):
        surplus = _count_rows(stream, encoding, mark, len(names), lines, where)
        if surplus:
            logger.warning("%s: each row ends with %d empty field(s) without a column name; ignored", where, surplus)
        names += [f"{UNNAMED}{len(names) + number}" for number in range(surplus)]
    stream.seek(0)
    if encoding != "utf-8":
        logger.info("%s: decoded as %s%s", where, encoding, "" if encoding != "cp1252" else ", since it is not UTF-8")
    if (mark, point) != (",", ".") and (separator is None or decimal is None):
        logger.info("%s: the field separator is %r, the decimal mark is %r", where, mark, point)
    return Dialect(encoding, mark, point, tuple(names), lines, names == header)


def _encoding(stream: BinaryIO, where: str) -> str:
    """Return utf-8, or utf-16 or utf-32 for a stream with their byte order mark, or else cp1252 (Windows-1252)."""
    stream.seek(0)
    start = stream.read(64)
    for mark, what in _OTHERS.items():
        if start.lstrip().lower().startswith(mark.lower()):
            raise UserError(f"{where}: cannot be read as a table (it is {what})")
    found = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    stream.seek(0)
    if found is not None:
        try:
            for _ in _blocks(stream, found):
                pass
        except UnicodeError as error:
            raise UserError(f"{where}: cannot be read as a table (invalid {found}: {error})") from None
        return found
    decoder, utf8, windows = codecs.getincrementaldecoder("utf-8")(), True, True
    while block := stream.read(_BLOCK):
        if b"\0" in block:
            raise UserError(
                f"{where}: cannot be read as a table (it contains zero bytes: either it is not text, or it is UTF-16 "
                "without a byte order mark; save it as UTF-8)"
            )
        if block.isascii() and not decoder.getstate()[0]:
            continue
        windows = windows and block.translate(None, _NO_LETTERS) == block
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            utf8 = False
            decoder.reset()
        if not utf8 and not windows:
            raise UserError(f"{where}: cannot be read as a table (neither UTF-8 nor Windows-1252; save it as UTF-8)")
    return "utf-8" if utf8 and not decoder.getstate()[0] else "cp1252"


def _blocks(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Yield the stream from its start in blocks of bytes; UTF-16 and UTF-32 are converted to UTF-8."""
    stream.seek(0)
    if encoding in ("utf-8", "cp1252"):
        while block := stream.read(_BLOCK):
            yield block
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    while block := stream.read(_BLOCK):
        yield decoder.decode(block).encode()
    decoder.decode(b"", final=True)


def _sample(stream: BinaryIO, encoding: str, where: str) -> str:
    """Return the header and the first rows as whole lines, or all of a short text."""
    found, end = b"", 0
    for block in _blocks(stream, encoding):
        if end:
            found = found[:end]
            break
        found += block
        end = max(found.rfind(b"\n"), found.rfind(b"\r")) + 1
        if len(found) > _LONGEST_HEADER:
            raise UserError(
                f"{where}: cannot be read as a table (the first line exceeds {_LONGEST_HEADER} bytes; is it a CSV?)"
            )
    return found.decode("cp1252" if encoding == "cp1252" else "utf-8").removeprefix("\ufeff")


def _rows(sample: str, mark: str, most: int = _SAMPLE) -> list[list[str]]:
    """Return the header and the first rows without empty lines; an empty list if they cannot be parsed."""
    text = _body(sample)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        header = next(reader)
        return [header, *islice((row for row in reader if not _blank(row)), most)]
    except (csv.Error, StopIteration):
        return []


def _body(sample: str) -> str:
    """Return ``sample`` without the empty lines before the header."""
    found = _LEADING.match(sample)
    return sample if found is None else sample[found.end() :]


def _blank(row: list[str]) -> bool:
    """Return whether a row is an empty line."""
    return not row or (len(row) == 1 and not row[0].strip())


def _separator(sample: str, where: str) -> str:
    """Return the separator that gives the first rows as many fields as the header.

    If there are several, the one with the most fields is returned.
    """
    first = sample.lstrip().splitlines()[0].strip().strip('"')
    if re.fullmatch(r"sep=.?", first):
        raise UserError(f"{where}: the first line is {first!r} instead of the column names; remove that line")
    even: dict[str, int] = {}
    wide: dict[str, int] = {}
    for mark in SEPARATORS.values():
        rows = _rows(sample, mark)
        if rows and len(rows[0]) > 1:
            wide[mark] = len(rows[0])
            if all(len(row) == len(rows[0]) for row in rows):
                even[mark] = len(rows[0])
    found = even or wide
    if not found:
        return ","
    best = [mark for mark in found if found[mark] == max(found.values())]
    if len(best) > 1 and even:
        marks = " or ".join(repr(mark) for mark in best)
        raise UserError(
            f"{where}: the separator is ambiguous: {marks} would fit; choose one with data.separator (--separator)"
        )
    return best[0]


def _header(sample: str, mark: str, where: str) -> tuple[list[str], int]:
    """Return the names in the header, and the number of lines up to its end."""
    text = _body(sample)
    before = len(sample[: len(sample) - len(text)].splitlines())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    try:
        return next(reader), before + reader.line_num
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as a table (line {reader.line_num}: {error})") from None


def _decimal(sample: str, mark: str, where: str) -> str:
    """Return the decimal mark of the numbers in the first rows. ``mark`` is the separator."""
    if mark == ",":
        return "."
    fields = [field.strip() for row in _rows(sample, mark)[1:] for field in row]
    if any(_THOUSANDS.fullmatch(field) for field in fields):
        return "."
    comma = next((field for field in fields if _COMMA.fullmatch(field)), None)
    point = next((field for field in fields if _POINT.fullmatch(field)), None)
    if comma is not None and point is not None:
        raise UserError(
            f"{where}: it contains both {comma!r} and {point!r}; set data.decimal (--decimal) to its decimal mark"
        )
    return "." if comma is None else ","


def _question(header: list[str], where: str) -> None:
    """Log warnings for a header with repeated names, or with values instead of names."""
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        logger.warning("%s: several columns are named %s; the later ones become %s.1, ...", where, twice[0], twice[0])
    names = [name.strip() for name in header if name.strip()]
    numbers = [name for name in names if _COMMA.fullmatch(name) or _POINT.fullmatch(name) or name.isdigit()]
    dated = len(names) > 1 and _DATE.match(names[0]) is not None and names[0] not in numbers
    if len(numbers) == len(names) - dated and (dated or not all(name.isdigit() for name in numbers)):
        logger.warning(
            "%s: the first line (%s) is used as the column names; if it contains values, add a line with the names "
            "before it",
            where,
            ", ".join(names[:4]),
        )


def _unique(header: list[str]) -> list[str]:
    """Make names unique as pandas does: number repeated names, and name columns without a name by their position."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for position, name in enumerate(header):
        found = name or f"{UNNAMED}{position}"
        wanted = found
        while found in seen:
            seen[wanted] += 1
            found = f"{wanted}.{seen[wanted]}"
        seen[found] = 0
        names.append(found)
    return names


def _uneven(blocks: Iterator[bytes], mark: str, newline: bytes, fields: int) -> bool:
    """Return False if every row surely has the given number of fields; True if some row may have another number.

    Quoted fields are removed first. Then only separators and line ends are compared, as bytes and in C, which takes a
    fraction of the time of parsing. Text that is too complex for this gives True. Empty lines at the end are ignored.
    """
    separator = mark.encode()
    others = bytes(set(range(256)) - set(separator + newline + b'"'))
    row = separator * (fields - 1) + newline
    ends = re.escape(separator) + b"\r\n"
    quoted = re.compile(b'"(?<![^' + ends + b']")[^"]*(?:""[^"]*)*"(?=[' + ends + b"])")
    rest = b""
    for block in _without_end(blocks):
        rest += block
        if b'"' in rest:
            rest = quoted.sub(b"", rest)
        opened = rest.find(b'"')
        cut = rest.rfind(newline, 0, len(rest) if opened < 0 else opened) + 1
        lines, rest = rest[:cut].translate(None, others), rest[cut:]
        if lines != row * (len(lines) // len(row)) or (opened >= 0 and len(rest) > _LONGEST_FIELD):
            return True
    return quoted.sub(b"", rest + newline).translate(None, others) not in (row, newline[: fields == 1])


def _without_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield ``blocks`` without the byte order mark, and without the line ends and blanks at the end of the stream."""
    kept, first = b"", True
    for block in blocks:
        whole = kept + (block.removeprefix(codecs.BOM_UTF8) if first else block)
        used, first = whole.rstrip(b"\r\n "), False
        kept = whole[len(used) :]
        yield used


def _count_rows(stream: BinaryIO, encoding: str, mark: str, fields: int, header_lines: int, where: str) -> int:
    """Return the number of empty fields that each row has in addition to those of the header.

    Raises:
        UserError: if rows differ from the header in any other way.
    """
    stream.seek(0)
    text = io.TextIOWrapper(stream, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
    reader = csv.reader(text, delimiter=mark)
    rows = (row for row in reader if row and (fields == 1 or not _blank(row)))
    surplus = -1
    try:
        while reader.line_num < header_lines:
            next(reader)
        for row in rows:
            first = surplus < 0
            if first:
                surplus = max(0, len(row) - fields)
            if len(row) == fields + surplus and not any(row[fields:]):
                continue
            if first and surplus == 1 and all(len(other) == len(row) for other in rows):
                raise UserError(
                    f"{where}: every row has {len(row)} fields, but the header names {fields} columns (separator "
                    f"{mark!r}); add the missing name, which is often the name of the first column"
                )
            raise UserError(
                f"{where}: line {reader.line_num} has {len(row)} fields, but the header names {fields} columns "
                f"(separator {mark!r}); correct that line, or set data.separator (--separator)"
            )
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as a table (line {reader.line_num}: {error})") from None
    finally:
        text.detach()
    return max(0, surplus)
