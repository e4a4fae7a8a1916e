"""The first pass over long tables: which series there are, how many rows, and when they begin, end and step.

Long tables of any size: one pass counts the series and their times, one puts every row into its place on disk.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.arrow import batches, numbers_of, schema_of
from mmtrain.data.prepare.panel_writer import Layout, Series
from mmtrain.data.series.timeline import Step, Steps, Timeline
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from mmtrain.data.prepare.panel_files import Columns

Int64s = NDArray[np.int64]


@dataclass
class Scan:
    """What the first pass learns, by number of series: rows, first and last time (µs)."""

    numbers: dict[str, int] = field(default_factory=dict)
    rows: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    low: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    high: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    last: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    steps: Steps = field(default_factory=Steps)

    def grow(self) -> None:
        """Room for all numbers given out."""
        more = len(self.numbers) - len(self.rows)
        if more <= 0:
            return
        more = max(more, len(self.rows))
        big = np.iinfo(np.int64).max
        for name, value in (("rows", 0), ("low", big), ("high", -big), ("last", -big)):
            setattr(self, name, np.concatenate([getattr(self, name), np.full(more, value, np.int64)]))

    def add(self, numbers: Int64s, stamps: Int64s | None) -> None:
        self.grow()
        np.add.at(self.rows, numbers, 1)
        if stamps is None:
            return
        order = np.argsort(numbers, kind="stable")
        who, when = numbers[order], stamps[order]
        first = np.concatenate([[True], who[1:] != who[:-1]])
        before = np.where(first, self.last[who], np.concatenate([[0], when[:-1]]))
        known = before > -np.iinfo(np.int64).max
        self.steps.add((when - before)[known])
        end = np.concatenate([first[1:], [True]])
        self.last[who[end]] = when[end]
        self.steps.see(stamps)
        np.minimum.at(self.low, numbers, stamps)
        np.maximum.at(self.high, numbers, stamps)

    def close(self) -> None:
        count = len(self.numbers)
        self.rows, self.low, self.high = self.rows[:count], self.low[:count], self.high[:count]


def scan_files(files: list[Path], columns: Columns) -> Scan:
    """The first pass over ``files``.

    Raises:
        UserError: for files without rows, columns that some file lacks, or times that are none.
    """
    scan = Scan()
    for file in files:
        names = [name for name in (columns.id, columns.time) if name is not None]
        wanted = names or (columns.targets or [])[:1]
        _check_columns(file, [*wanted, *(columns.targets or []), *columns.known, *columns.static])
        for batch in batches(file, wanted, names):
            scan.add(series_numbers(batch, file, columns, scan.numbers), row_stamps(batch, file, columns))
    scan.close()
    if not len(scan.rows):
        raise UserError(f"{files[0].parent if len(files) > 1 else files[0]}: there are no rows")
    return scan


def _check_columns(file: Path, names: list[str]) -> None:
    there = schema_of(file).names
    lacking = [name for name in names if name not in there]
    if lacking:
        raise UserError(f"{file}: columns {', '.join(lacking)} are missing, which the first file has")


def series_numbers(batch: pa.RecordBatch, file: Path, columns: Columns, known: dict[str, int]) -> Int64s:
    """The number of the series of each row; new ids get the next one."""
    if columns.id is None:
        return np.full(batch.num_rows, known.setdefault(file.stem, len(known)), dtype=np.int64)
    encoded = batch.column(columns.id).dictionary_encode()
    if encoded.null_count:
        raise UserError(f"{file}: the id column {columns.id!r} is empty in {encoded.null_count} row(s)")
    numbers = [known.setdefault(str(name), len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def row_stamps(batch: pa.RecordBatch, file: Path, columns: Columns) -> Int64s | None:
    """Times in µs, or None where there are none."""
    import pandas as pd
    import pyarrow as pa

    if columns.time is None:
        return None
    column = batch.column(columns.time)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        raise UserError(
            f"{file}: the time column {columns.time!r} holds numbers, not dates: correct it, or give --time none to "
            "take the rows as they come"
        )
    text = column.to_pandas()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    offsets = is_text and len(text) > 0 and _has_offset(str(text.iloc[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a format that is not one of the usual
        stamps = pd.to_datetime(text, errors="coerce", utc=offsets)
    if stamps.isna().any():
        value = text[stamps.isna()].iloc[0]
        raise UserError(f"{file}: time column {columns.time!r}: {value!r} is no date: correct it, or give --time none")
    if getattr(stamps.dt, "tz", None) is not None:
        stamps = stamps.dt.tz_convert("UTC").dt.tz_localize(None)
    return stamps.to_numpy().astype("datetime64[us]").astype(np.int64)


def _has_offset(text: str) -> bool:
    text = text.strip()
    return text.endswith("Z") or "+" in text[10:] or "-" in text[10:]


#: A grid of so many times the rows that are there is taken for a step that was guessed wrongly.
_MOST_GAPS = 4
logger = logging.getLogger("mmtrain")


def open_long(
    files: list[Path], columns: Columns, part: Path, step: Step | None, duplicates: str
) -> tuple[Layout, Iterator[Series]]:
    """Scan ``files``; the stream of their series sorts their rows into temporary files in ``part`` first."""
    scan = scan_files(files, columns)
    timeline = None if columns.time is None else _timeline(files, scan, step)
    layout = Layout(list(columns.targets or []), columns.known, columns.static, timeline=timeline)
    return layout, _series(files, columns, part, scan, timeline, duplicates)


def _timeline(files: list[Path], scan: Scan, step: Step | None) -> Timeline:
    usual = step or scan.steps.usual()
    where = files[0].parent if len(files) > 1 else files[0]
    if usual is None:
        raise UserError(f"{where}: no series has two times, so there is no step: give --step, or --time none")
    if scan.steps.backward:
        logger.info("%s: %d rows come before earlier ones of their series; they are sorted", where, scan.steps.backward)
    timeline = Timeline(np.datetime64(int(scan.low.min()), "us"), usual)
    grid = int((_places(timeline, scan.high) - _places(timeline, scan.low) + 1).sum())
    if grid > _MOST_GAPS * int(scan.rows.sum()):
        raise UserError(
            f"{where}: at a step of {usual} its {int(scan.rows.sum())} rows would be {grid}, most of them holes: give "
            "the right --step, or --time none to take the rows as they come"
        )
    return timeline


def _places(timeline: Timeline, microseconds: Int64s) -> Int64s:
    return timeline.places(microseconds.astype("datetime64[us]"))[0]


class _Static:
    """The value of each static column by number of series; it must never change."""

    def __init__(self, names: list[str], series: int) -> None:
        self.names = names
        self.codes: list[dict[Any, int]] = [{} for _ in names]
        self.of_series = np.full((len(names), series), -1, dtype=np.int64)

    def add(self, batch: pa.RecordBatch, numbers: Int64s, file: Path, ids: list[str]) -> None:
        for place, name in enumerate(self.names):
            encoded = batch.column(name).dictionary_encode(null_encoding="encode")
            known = self.codes[place]
            values = (None if value != value else value for value in encoded.dictionary.to_pylist())  # NaN is no key
            local = [known.setdefault(value, len(known)) for value in values]
            codes = np.array(local, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
            mine = self.of_series[place]
            new = mine[numbers] < 0
            mine[numbers[new]] = codes[new]
            wrong = mine[numbers] != codes
            if wrong.any():
                series = ids[int(numbers[int(np.argmax(wrong))])]
                raise UserError(
                    f"{file}: static column {name!r} changes within series {series!r}: leave it out of --static, or "
                    "name it with --known if it is known in advance"
                )


def _series(
    files: list[Path], columns: Columns, part: Path, scan: Scan, timeline: Timeline | None, duplicates: str
) -> Iterator[Series]:
    first = _places(timeline, scan.low) if timeline else np.zeros_like(scan.rows)
    length = _places(timeline, scan.high) - first + 1 if timeline else scan.rows
    offset = np.cumsum(length) - length
    width = len(columns.targets or []) + len(columns.known)
    table = _Table(part, int(length.sum()), width)
    static = _Static(list(columns.static), len(scan.rows))
    ids = list(scan.numbers)
    try:
        repeated = _sort(files, columns, table, scan, static, timeline, first, offset, duplicates)
        _report(files, scan, timeline, length, repeated)
        values = {place: list(column) for place, column in enumerate(static.codes)}
        for number, name in enumerate(ids):
            rows = table.read(int(offset[number]), int(length[number]))
            about = tuple(values[place][int(static.of_series[place, number])] for place in values)
            split = len(columns.targets or [])
            yield Series(name, rows[:, :split], rows[:, split:], int(first[number]), about)
    finally:
        table.remove()


def _sort(
    files: list[Path],
    columns: Columns,
    table: _Table,
    scan: Scan,
    static: _Static,
    timeline: Timeline | None,
    first: Int64s,
    offset: Int64s,
    duplicates: str,
) -> int:
    """Every row to its place in ``table``; how many came a second time."""
    ids, cursor, repeated = list(scan.numbers), np.zeros_like(scan.rows), 0
    data = [*(columns.targets or []), *columns.known]
    keys = [name for name in (columns.id, columns.time) if name is not None]
    for file in files:
        schema = schema_of(file)
        text = {*keys, *(name for name in columns.static if _is_text(schema.field(name).type))}
        for batch in batches(file, [*keys, *columns.static, *data], text):
            numbers = series_numbers(batch, file, columns, scan.numbers)
            stamps = row_stamps(batch, file, columns)
            if timeline is None or stamps is None:
                place = _next_places(numbers, cursor)
            else:
                place, on = timeline.places(stamps.astype("datetime64[us]"))
                if not on.all():
                    row = int(np.argmin(on))
                    raise UserError(
                        f"{file}: series {ids[int(numbers[row])]!r}: {_time(stamps[row])} is not a whole number of "
                        f"steps of {timeline.step} from {timeline.origin} ({int((~on).sum())} such rows here): correct "
                        "the times, give --step, or --time none to take the rows as they come"
                    )
                place = place - first[numbers]
            where = offset[numbers] + place
            twice = table.taken(where)
            if twice.any() and duplicates == "error":
                row = int(np.argmax(twice))
                raise UserError(
                    f"{file}: series {ids[int(numbers[row])]!r} has {_time(stamps[row]) if stamps is not None else ''} "
                    f"more than once ({int(twice.sum())} such rows here): remove them, or give --duplicates last"
                )
            repeated += int(twice.sum())
            static.add(batch, numbers, file, ids)
            table.write(where, numbers_of(batch, data, file))
    return repeated


def _time(microseconds: Any) -> str:
    return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _next_places(numbers: Int64s, cursor: Int64s) -> Int64s:
    """The place of each row in its series, in the order of the rows; ``cursor`` goes on."""
    order = np.argsort(numbers, kind="stable")
    who = numbers[order]
    begins = np.flatnonzero(np.concatenate([[True], who[1:] != who[:-1]])) if len(who) else np.zeros(0, np.int64)
    counts = np.diff(np.append(begins, len(who)))
    place = np.empty_like(numbers)
    place[order] = np.arange(len(who)) - np.repeat(begins, counts) + cursor[who]
    cursor[who[begins]] += counts
    return place


def _report(files: list[Path], scan: Scan, timeline: Timeline | None, length: Int64s, repeated: int) -> None:
    where = files[0].parent if len(files) > 1 else files[0]
    if repeated:
        logger.warning("%s: %d rows come a second time in their series: the last one counts", where, repeated)
    gaps = int(length.sum() - scan.rows.sum()) + repeated
    if timeline is not None and gaps:
        some = int((length > scan.rows).sum())
        logger.warning(
            "%s: %d steps of %s are not there between others, in %d series: they become holes",
            where,
            gaps,
            timeline.step,
            some,
        )


class _Table:
    """Rows (n, width) float32 on disk, NaN until they are written; mapped only for as long as it takes."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.data, self.mark, self.shape = folder / "rows.tmp", folder / "taken.tmp", (rows, width)
        with open(self.data, "wb") as stream:
            empty = np.full(((1 << 18) // max(width, 1) + 1, width), np.nan, np.float32)
            for begin in range(0, rows, len(empty)):
                empty[: rows - begin].tofile(stream)
        with open(self.mark, "wb") as stream:
            stream.truncate(max(rows, 1))

    def taken(self, where: Int64s) -> NDArray[np.bool_]:
        """Which rows were written before, or come twice in ``where``; then all of them are."""
        mark = np.memmap(self.mark, dtype=np.bool_, mode="r+")
        again = mark[where].copy()
        _, first = np.unique(where, return_index=True)
        later = np.ones(len(where), dtype=bool)
        later[first] = False
        mark[where] = True
        return again | later

    def write(self, where: Int64s, rows: NDArray[np.float32]) -> None:
        """Of rows for one place the last stays."""
        if not len(where):
            return
        table = np.memmap(self.data, dtype=np.float32, mode="r+", shape=self.shape)
        last = len(where) - 1 - np.unique(where[::-1], return_index=True)[1]
        table[where[last]] = rows[last]

    def read(self, begin: int, count: int) -> NDArray[np.float32]:
        width = self.shape[1]
        found = np.fromfile(self.data, dtype=np.float32, count=count * width, offset=4 * begin * width)
        return found.reshape(count, width)

    def remove(self) -> None:
        self.data.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)
