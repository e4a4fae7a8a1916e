"""Long tables of any size, and files of one series each, as a stream of series.

A first pass counts the series, their rows and their times; a second one puts every row into its place on disk.

All files of a panel have one way of reading times, found before the first row is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.panel_writer import Layout, Series
from mmtrain.data.prepare.tables import Columns, batches, is_number, numbers_of, schema_of
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.timeline import Int64s, Step, Steps, Timeline, to_local
from mmtrain.data.series.times import Reading, are_dates, find_reading
from mmtrain.errors import UserError
from mmtrain.log import logger

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


#: A grid of more times than this for each row is taken for a step that was guessed wrongly.
_MOST_GAPS = 4
_NEVER = np.iinfo(np.int64).max


def open_long(
    files: list[Path], columns: Columns, part: Path, step: Step | None, duplicates: str
) -> tuple[Layout, Iterator[Series]]:
    """Scan ``files``; the stream of their series sorts their rows into temporary files in ``part`` first.

    Raises:
        UserError: for files without rows, columns that some file lacks, or times that are none.
    """
    columns = with_reading(files, columns)
    scan = _Scan(files, columns)
    where = files[0].parent if len(files) > 1 else files[0]
    if not len(scan.rows):
        raise UserError(f"{where}: there are no rows")
    timeline = None if columns.time is None else _timeline(where, scan, step)
    layout = Layout(columns.targets, columns.known, columns.static, timeline=timeline, zone=scan.zone)
    return layout, _Sorter(scan, part, timeline, duplicates).series(where)


class _Scan:
    """The first pass. By number of series: rows, and first and last time (µs)."""

    def __init__(self, files: list[Path], columns: Columns) -> None:
        self.files, self.columns, self.numbers = files, columns, dict[str, int]()
        self.steps, self.local = Steps(), Steps()
        self.zone = None if columns.reading is None else columns.reading.zone
        self._found = np.empty((4, 0), np.int64)  # rows, first time, last time, time of the latest row
        wanted = columns.keys or columns.targets[:1]
        for file in files:
            there = schema_of(file, columns.form).names
            needed = (*wanted, *columns.targets, *columns.known, *columns.static)
            if lacking := [name for name in needed if name not in there]:
                raise UserError(f"{file}: columns {', '.join(lacking)} are missing, which the first file has")
            for batch in batches(file, wanted, columns.keys, form=columns.form):
                self._add(_series_numbers(batch, file, columns, self.numbers), row_stamps(batch, file, columns))
        self.rows, self.low, self.high = self._found[:3, : len(self.numbers)]

    def _add(self, numbers: Int64s, stamps: Int64s | None) -> None:
        room = self._found.shape[1]
        if len(self.numbers) > room:
            more = np.repeat([[0], [_NEVER], [-_NEVER], [-_NEVER]], max(len(self.numbers) - room, room), axis=1)
            self._found = np.concatenate([self._found, more], axis=1)
        rows, low, high, latest = self._found
        np.add.at(rows, numbers, 1)
        if stamps is None:
            return
        order, who, first = _by_series(numbers)
        when = stamps[order]
        before = np.where(first, latest[who], np.concatenate([[0], when[:-1]]))
        both = before > -_NEVER
        self.steps.add((when - before)[both])
        end = np.ones(len(first), dtype=bool)
        end[:-1] = first[1:]
        latest[who[end]] = when[end]
        self.steps.see(stamps)
        if self.zone is not None:
            self.local.add(_local(when[both], self.zone) - _local(before[both], self.zone))
            self.local.see(_local(stamps, self.zone))
        np.minimum.at(low, numbers, stamps)
        np.maximum.at(high, numbers, stamps)


def _local(microseconds: Int64s, zone: str) -> Int64s:
    return to_local(microseconds.astype("datetime64[us]"), zone).astype(np.int64)


def _by_series(numbers: Int64s) -> tuple[Int64s, Int64s, NDArray[np.bool_]]:
    """The order of rows that sorts them by series, their series in that order, and which rows are a series' first."""
    order = np.argsort(numbers, kind="stable")
    who = numbers[order]
    first = np.ones(len(who), dtype=bool)
    first[1:] = who[1:] != who[:-1]
    return order, who, first


def _series_numbers(batch: pa.RecordBatch, file: Path, columns: Columns, known: dict[str, int]) -> Int64s:
    """The number of the series of each row; new ids get the next one."""
    if columns.id is None:
        return np.full(batch.num_rows, known.setdefault(file.stem, len(known)), dtype=np.int64)
    encoded = batch.column(columns.id).dictionary_encode()
    if encoded.null_count:
        raise UserError(f"{file}: the id column {columns.id!r} is empty in {encoded.null_count} row(s)")
    numbers = [known.setdefault(str(name), len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _timeline(where: Path, scan: _Scan, step: Step | None) -> Timeline:
    origin = np.datetime64(int(scan.low.min()), "us")
    timeline = scan.steps.timeline(origin, step)
    if scan.zone is not None:
        local = scan.local.timeline(to_local(np.array([origin]), scan.zone)[0], step)
        if local is not None and local.step.whole_days:
            timeline = replace(local, zone=scan.zone)
    if timeline is None:
        raise UserError(f"{where}: no series has two times, so there is no step: give --step, or --time none")
    if scan.steps.backward:
        logger.info("%s: %d rows come before earlier ones of their series; they are sorted", where, scan.steps.backward)
    grid = int((_places(timeline, scan.high) - _places(timeline, scan.low) + 1).sum())
    if grid > _MOST_GAPS * int(scan.rows.sum()):
        raise UserError(
            f"{where}: at a step of {timeline.step} its {int(scan.rows.sum())} rows would be {grid}, most of them "
            "holes: give the right --step, or --time none to take the rows as they come"
        )
    return timeline


def _places(timeline: Timeline, microseconds: Int64s) -> Int64s:
    return timeline.places(microseconds.astype("datetime64[us]"))[0]


class _Sorter:
    """The second pass. By number of series: the first place on the timeline, the length, and the first row on disk."""

    def __init__(self, scan: _Scan, part: Path, timeline: Timeline | None, duplicates: str) -> None:
        self.scan, self.part, self.timeline, self.duplicates = scan, part, timeline, duplicates
        self.ids = list(scan.numbers)
        self.first = _places(timeline, scan.low) if timeline else np.zeros_like(scan.rows)
        self.length = _places(timeline, scan.high) - self.first + 1 if timeline else scan.rows
        self.offset = np.cumsum(self.length) - self.length
        self.static = _Static(scan.columns.static, len(self.ids))
        self._next = np.zeros_like(scan.rows)

    def series(self, where: Path) -> Iterator[Series]:
        """Sort the rows, say what was found on the way, and read the series one after the other."""
        rows, length, targets = self.scan.rows, self.length, len(self.scan.columns.targets)
        table = _Table(self.part, int(length.sum()), targets + len(self.scan.columns.known))
        try:
            repeated = self._sort(table)
            if repeated:
                logger.warning("%s: %d rows come a second time in their series: the last one counts", where, repeated)
            gaps = int(length.sum() - rows.sum()) + repeated
            if self.timeline is not None and gaps:
                logger.warning(
                    "%s: %d steps of %s are not there between others, in %d series: they become holes",
                    where,
                    gaps,
                    self.timeline.step,
                    int((length > rows).sum()),
                )
            static = [list(codes) for codes in self.static.codes]
            for number, name in enumerate(self.ids):
                found = table.read(int(self.offset[number]), int(length[number]))
                codes = self.static.of_series[:, number]
                about = tuple(values[code] for values, code in zip(static, codes, strict=True))
                yield Series(name, found[:, :targets], found[:, targets:], int(self.first[number]), about)
        finally:
            table.remove()

    def _sort(self, table: _Table) -> int:
        """Write every row to its place in ``table``; return how many came a second time."""
        columns, repeated = self.scan.columns, 0
        data = [*columns.targets, *columns.known]
        for file in self.scan.files:
            schema = schema_of(file, columns.form)
            text = {*columns.keys, *(name for name in columns.static if not is_number(schema.field(name).type))}
            for batch in batches(file, [*columns.keys, *columns.static, *data], text, form=columns.form):
                numbers = _series_numbers(batch, file, columns, self.scan.numbers)
                stamps = row_stamps(batch, file, columns)
                where = self.offset[numbers] + self._place(numbers, stamps, file)
                twice = table.taken(where)
                if twice.any() and self.duplicates == "error":
                    row = int(np.argmax(twice))
                    raise UserError(
                        f"{file}: series {self.ids[int(numbers[row])]!r} has "
                        f"{_time(stamps[row]) if stamps is not None else ''} more than once ({int(twice.sum())} such "
                        "rows here): remove them, or give --duplicates last"
                    )
                repeated += int(twice.sum())
                self.static.add(batch, numbers, file, self.ids)
                table.write(where, numbers_of(batch, data, file))
        return repeated

    def _place(self, numbers: Int64s, stamps: Int64s | None, file: Path) -> Int64s:
        """The place of each row in its series: by its time, or without times in the order of the rows."""
        if self.timeline is None or stamps is None:
            order, who, first = _by_series(numbers)
            begins = np.flatnonzero(first)
            counts = np.diff(np.append(begins, len(who)))
            place = np.empty_like(numbers)
            place[order] = np.arange(len(who)) - np.repeat(begins, counts) + self._next[who]
            self._next[who[begins]] += counts
            return place
        place, on = self.timeline.places(stamps.astype("datetime64[us]"))
        if not on.all():
            row = int(np.argmin(on))
            cure = "correct the times, give --step, or --time none to take the rows as they come"
            if self.timeline.zone is not None:
                cure += (
                    f". Days are counted at {self.timeline.zone}: where the UTC offset of the rows changes with the"
                    " season, write local times without it"
                )
            raise UserError(
                f"{file}: series {self.ids[int(numbers[row])]!r}: {_time(stamps[row])} is not a whole number of "
                f"steps of {self.timeline.step} from {self.timeline.origin} ({int((~on).sum())} such rows here): {cure}"
            )
        return place - self.first[numbers]


def _time(microseconds: Any) -> str:
    return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


class _Static:
    """The value of each static column by number of series; it must never change."""

    def __init__(self, names: list[str], series: int) -> None:
        self.names = names
        self.codes: list[dict[Any, int]] = [{} for _ in names]
        self.of_series = np.full((len(names), series), -1, dtype=np.int64)

    def add(self, batch: pa.RecordBatch, numbers: Int64s, file: Path, ids: list[str]) -> None:
        for name, known, mine in zip(self.names, self.codes, self.of_series, strict=True):
            encoded = batch.column(name).dictionary_encode(null_encoding="encode")
            values = (None if value != value else value for value in encoded.dictionary.to_pylist())  # NaN is no key
            local = [known.setdefault(value, len(known)) for value in values]
            codes = np.array(local, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
            new = mine[numbers] < 0
            mine[numbers[new]] = codes[new]
            wrong = mine[numbers] != codes
            if wrong.any():
                series = ids[int(numbers[int(np.argmax(wrong))])]
                raise UserError(
                    f"{file}: static column {name!r} changes within series {series!r}: leave it out of --static, or "
                    "name it with --known if it is known in advance"
                )


class _Table:
    """Rows (n, width) float64 on disk, NaN until they are written; mapped only for as long as it takes."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.data, self.mark, self.shape = folder / "rows.tmp", folder / "taken.tmp", (rows, width)
        with open(self.data, "wb") as stream:
            empty = np.full(((1 << 18) // max(width, 1) + 1, width), np.nan)
            for begin in range(0, rows, len(empty)):
                empty[: rows - begin].tofile(stream)
        with open(self.mark, "wb") as stream:
            stream.truncate(max(rows, 1))

    def taken(self, where: Int64s) -> NDArray[np.bool_]:
        """Mark the rows ``where`` as written; tells which were marked before, or come again in ``where``."""
        mark = np.memmap(self.mark, dtype=np.bool_, mode="r+")
        again = mark[where].copy()
        _, first = np.unique(where, return_index=True)
        later = np.ones(len(where), dtype=bool)
        later[first] = False
        mark[where] = True
        return again | later

    def write(self, where: Int64s, rows: NDArray[np.float64]) -> None:
        """Write ``rows`` to the places ``where``; of several rows for one place the last stays."""
        if not len(where):
            return
        table = np.memmap(self.data, dtype=np.float64, mode="r+", shape=self.shape)
        last = len(where) - 1 - np.unique(where[::-1], return_index=True)[1]
        table[where[last]] = rows[last]

    def read(self, begin: int, count: int) -> NDArray[np.float64]:
        width = self.shape[1]
        found = np.fromfile(self.data, dtype=np.float64, count=count * width, offset=8 * begin * width)
        return found.reshape(count, width)

    def remove(self) -> None:
        self.data.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)


def with_reading(files: list[Path], columns: Columns) -> Columns:
    """``columns`` with the way in which their times are read. Only dates that are no ISO 8601 need all rows for it.

    Raises:
        UserError: for numbers that are no times, and dates that could be read in two ways.
    """
    if columns.time is None:
        return columns
    where = f"{files[0].parent if len(files) > 1 else files[0]}: time column {columns.time!r}"
    parts = _parts(files, columns.time, columns.form)
    first = next(parts, None)
    if first is None:
        return columns
    reading = _plain(first, where, columns.form)
    if reading is None:
        import pandas as pd

        found = [first.drop_duplicates(), *(part.drop_duplicates() for part in parts)]
        reading = find_reading(pd.concat(found).drop_duplicates(), where, columns.form.time_format)
    if reading is None:
        raise UserError(
            f"{where} holds numbers, not dates: correct it, set --time-format (s, ms, us or ns for numbers since "
            "1970), or give --time none to take the rows as they come"
        )
    return replace(columns, reading=reading)


def _parts(files: list[Path], name: str, form: TableFormat) -> Iterator[pd.Series]:
    for file in files:
        for batch in batches(file, [name], [name], form=form):
            yield batch.column(name).to_pandas()


def _plain(column: pd.Series, where: str, form: TableFormat) -> Reading | None:
    """The reading of times that cannot be misread, whatever rows follow; else None."""
    import pandas as pd

    if form.time_format is not None or pd.api.types.is_datetime64_any_dtype(column):
        return find_reading(column, where, form.time_format)
    if pd.api.types.is_numeric_dtype(column) or not len(column):
        return None
    text = str(column.iloc[0])
    if len(text) < 7 or text.strip().isdigit() or text[4:5] not in "-/":
        return None
    found = find_reading(column, where)
    return found if found is not None and found.kind == "iso" else None


def row_stamps(batch: pa.RecordBatch, file: Path, columns: Columns) -> Int64s | None:
    """Times in µs, or None where there are none."""
    if columns.time is None or columns.reading is None:
        return None
    column = batch.column(columns.time).to_pandas()
    stamps = columns.reading.stamps(column)
    bad = np.isnat(stamps)
    if bad.any():
        value = column.iloc[int(np.argmax(bad))]
        raise UserError(
            f"{file}: time column {columns.time!r}: {value!r} is no date: correct it, or give --time-format, "
            "or --time none"
        )
    return stamps.astype(np.int64)


def find_dates(file: Path, ids: str | None, names: Sequence[str], form: TableFormat) -> str | None:
    """The only one of the columns ``names`` that holds dates, of a table whose series have more rows than one."""
    wanted = [*names, *([] if ids is None else [ids])]
    batch = next(iter(batches(file, wanted, wanted, form=form)), None)
    if batch is None or (ids is not None and len(batch.column(ids).unique()) == batch.num_rows):
        return None
    found = [name for name in names if are_dates(batch.column(name).to_pandas())]
    return found[0] if len(found) == 1 else None
