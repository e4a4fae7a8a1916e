"""How a CSV is written: its encoding, the marks between fields and in numbers, its columns. Every row is counted."""

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
#: A quoted field that is longer than this is looked for row by row.
_LONGEST_FIELD = 1 << 24
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Beginnings of what is no CSV, whatever its name says.
_OTHERS = {
    b"PK\3\4": "a zip archive or an Excel workbook: name the one .zip, save the other as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save it as CSV",
    b"PAR1": "a parquet file: name it .parquet",
    b"\x1f\x8b": "packed by gzip: name it .csv.gz",
    b"<!DOCTYPE": "a web page, and not the file behind it",
    b"<html": "a web page, and not the file behind it",
    b"version https://git-lfs": "a pointer of Git LFS: get the file with git lfs pull",
}
#: Bytes that Windows-1252 does not have.
_NO_LETTERS = b"\x81\x8d\x8f\x90\x9d"
_DATE = re.compile(r"\d{1,4}[-/.]\d")
_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_POINT = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
#: Empty lines before the header.
_LEADING = re.compile(r"(?: *(?:\r\n|\n|\r))*")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+\.\d+|[+-]?\d{1,3}(?:,\d{3}){2,}")


@dataclass(frozen=True)
class Dialect:
    """``names``: the columns, unique; those without a name, such as "Unnamed: 0", are numbered from 0.

    ``header_lines``: lines up to the end of the header. ``literal``: the header has exactly these names.
    """

    encoding: str
    separator: str
    decimal: str
    names: tuple[str, ...]
    header_lines: int
    literal: bool


def examine(stream: BinaryIO, where: str, separator: str | None = None, decimal: str | None = None) -> Dialect:
    """Read the whole of a CSV once and say how it is written; ``stream`` must be seekable.

    Args:
        where: the file, for messages.
        separator, decimal: None finds them in the first rows. They may be names in ``SEPARATORS`` and ``DECIMALS``.

    Raises:
        UserError: for what is no text, what could be read in two ways, and rows with another number of fields than the
            header.
    """
    if separator is not None:
        separator = SEPARATORS.get(separator.strip().lower(), separator)
        if len(separator) != 1 or not separator.isascii() or separator in '"\r\n' or separator.isalnum():
            raise UserError(f"data.separator={separator!r}: one character, or one of {', '.join(SEPARATORS)}")
    if decimal is not None:
        decimal = DECIMALS.get(decimal, decimal)
        if decimal not in DECIMALS.values():
            raise UserError(f"data.decimal={decimal!r}: one of {', '.join(DECIMALS)}")
    encoding = _encoding(stream, where)
    sample = _sample(stream, encoding, where)
    if not sample.strip():
        raise UserError(f"{where}: cannot be read as a table (the file is empty)")
    mark = separator or _separator(sample, where)
    header, lines = _header(sample, mark, where)
    point = decimal or _decimal(sample, mark, where)
    if mark == point:
        raise UserError(f"{where}: {mark!r} cannot be both data.separator and data.decimal")
    names = _unique(header)
    _question(header, where)
    if _uneven(_blocks(stream, encoding), mark, b"\n" if "\n" in sample else b"\r", len(names)):
        surplus = _count_rows(stream, encoding, mark, len(names), lines, where)
        if surplus:
            logger.warning("%s: each row ends in %d empty field(s) without a name; left out", where, surplus)
        names += [f"{UNNAMED}{len(names) + place}" for place in range(surplus)]
    stream.seek(0)
    if encoding != "utf-8":
        logger.info("%s: read as %s%s", where, encoding, "" if encoding != "cp1252" else ", because it is not UTF-8")
    if (mark, point) != (",", ".") and (separator is None or decimal is None):
        logger.info("%s: read with %r between fields and %r in numbers", where, mark, point)
    return Dialect(encoding, mark, point, tuple(names), lines, names == header)


def _encoding(stream: BinaryIO, where: str) -> str:
    """Of the whole stream: utf-8, utf-16 or utf-32 with a byte order mark, or else cp1252 (Windows, Latin-1)."""
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
            raise UserError(f"{where}: cannot be read as a table (damaged {found}: {error})") from None
        return found
    decoder, utf8, windows = codecs.getincrementaldecoder("utf-8")(), True, True
    while block := stream.read(_BLOCK):
        if b"\0" in block:
            raise UserError(
                f"{where}: cannot be read as a table (it holds zero bytes, so it is no text, or UTF-16 without a byte "
                "order mark: save it as UTF-8)"
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
            raise UserError(f"{where}: cannot be read as a table (neither UTF-8 nor Windows-1252: save it as UTF-8)")
    return "utf-8" if utf8 and not decoder.getstate()[0] else "cp1252"


def _blocks(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    """The stream from its beginning, in bytes whose ASCII characters are those of the text."""
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
    """The header and rows after it: whole lines, or the whole text where it is short."""
    found, end = b"", 0
    for block in _blocks(stream, encoding):
        if end:
            found = found[:end]
            break
        found += block
        end = max(found.rfind(b"\n"), found.rfind(b"\r")) + 1
        if len(found) > _LONGEST_HEADER:
            raise UserError(
                f"{where}: cannot be read as a table (its first line is longer than {_LONGEST_HEADER} bytes)"
            )
    return found.decode("cp1252" if encoding == "cp1252" else "utf-8").removeprefix("\ufeff")


def _rows(sample: str, mark: str, most: int = _SAMPLE) -> list[list[str]]:
    """The header and the first rows, without empty lines; none where the text cannot be cut into rows."""
    text = _body(sample)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        header = next(reader)
        return [header, *islice((row for row in reader if not _blank(row)), most)]
    except (csv.Error, StopIteration):
        return []


def _body(sample: str) -> str:
    """From the header on."""
    found = _LEADING.match(sample)
    return sample if found is None else sample[found.end() :]


def _blank(row: list[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _separator(sample: str, where: str) -> str:
    """The mark that cuts the first rows into as many fields as the header; among several the one with most fields."""
    first = sample.lstrip().splitlines()[0].strip().strip('"')
    if re.fullmatch(r"sep=.?", first):
        raise UserError(f"{where}: its first line is {first!r}, and not the names of the columns: remove that line")
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
        raise UserError(f"{where}: its fields may be separated by {marks}: set data.separator (--separator)")
    return best[0]


def _header(sample: str, mark: str, where: str) -> tuple[list[str], int]:
    """The names of the columns, and the number of lines up to their end."""
    text = _body(sample)
    before = len(sample[: len(sample) - len(text)].splitlines())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    try:
        return next(reader), before + reader.line_num
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as a table (line {reader.line_num}: {error})") from None


def _decimal(sample: str, mark: str, where: str) -> str:
    if mark == ",":
        return "."
    fields = [field.strip() for row in _rows(sample, mark)[1:] for field in row]
    if any(_THOUSANDS.fullmatch(field) for field in fields):
        return "."
    comma = next((field for field in fields if _COMMA.fullmatch(field)), None)
    point = next((field for field in fields if _POINT.fullmatch(field)), None)
    if comma is not None and point is not None:
        raise UserError(
            f"{where}: it holds both {comma!r} and {point!r}: set data.decimal (--decimal) to the mark of its decimals"
        )
    return "." if comma is None else ","


def _question(header: list[str], where: str) -> None:
    """Say where a header is not what it should be."""
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        logger.warning("%s: several columns are called %s; the later ones become %s.1, ...", where, twice[0], twice[0])
    names = [name.strip() for name in header if name.strip()]
    numbers = [name for name in names if _COMMA.fullmatch(name) or _POINT.fullmatch(name) or name.isdigit()]
    dated = len(names) > 1 and _DATE.match(names[0]) is not None and names[0] not in numbers
    if len(numbers) == len(names) - dated and (dated or not all(name.isdigit() for name in numbers)):
        logger.warning(
            "%s: its first line (%s) is taken for the names of the columns; if it holds values, put a line with the "
            "names before it",
            where,
            ", ".join(names[:4]),
        )


def _unique(header: list[str]) -> list[str]:
    """As pandas names columns: those without a name by their place, and repeated ones with a number."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for place, name in enumerate(header):
        found = name or f"{UNNAMED}{place}"
        wanted = found
        while found in seen:
            seen[wanted] += 1
            found = f"{wanted}.{seen[wanted]}"
        seen[found] = 0
        names.append(found)
    return names


def _uneven(blocks: Iterator[bytes], mark: str, newline: bytes, fields: int) -> bool:
    """Whether some row may have another number of fields; empty lines at the end do not count.

    Fields that are quoted as a whole are left out; then only separators and line ends are looked at, in bytes and in C:
    it takes a part of the time of parsing. What is not so simple may differ.
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
    """``blocks`` without a byte order mark, and without line ends and blanks at the end of the last one."""
    kept, first = b"", True
    for block in blocks:
        whole = kept + (block.removeprefix(codecs.BOM_UTF8) if first else block)
        used, first = whole.rstrip(b"\r\n "), False
        kept = whole[len(used) :]
        yield used


def _count_rows(stream: BinaryIO, encoding: str, mark: str, fields: int, header_lines: int, where: str) -> int:
    """How many empty fields each row has beyond the header; raises UserError for rows that differ otherwise."""
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
                    f"{where}: every row has {len(row)} fields, but the header names {fields} columns (with {mark!r} "
                    "between them): add the name that is missing, often that of the first column"
                )
            raise UserError(
                f"{where}: line {reader.line_num} has {len(row)} fields, but the header names {fields} columns (with "
                f"{mark!r} between them): correct that line, or set data.separator (--separator)"
            )
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as a table (line {reader.line_num}: {error})") from None
    finally:
        text.detach()
    return max(0, surplus)
