"""Stream the series of long tables of any size, or of files with one series each.

A first pass finds the series, their numbers of rows and their times. A second pass writes every row to its position in
a temporary file. The format of the times is chosen before, once for all files.
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


#: If the grid has more times per row than this, the inferred time step is considered wrong.
_MOST_GAPS = 4
_NEVER = np.iinfo(np.int64).max


def open_long(
    files: list[Path], columns: Columns, part: Path, step: Step | None, duplicates: str
) -> tuple[Layout, Iterator[Series]]:
    """Scan ``files`` and return the layout of the panel and the stream of its series.

    Args:
        part: folder for temporary files, into which the stream sorts all rows first.
        step: the time step; None: the usual one.
        duplicates: "error", or "last" to use the last of several rows with the same time.

    Raises:
        UserError: if there are no rows, a file lacks a column, or a time cannot be read.
    """
    columns = with_reading(files, columns)
    scan = _Scan(files, columns)
    where = files[0].parent if len(files) > 1 else files[0]
    if not len(scan.rows):
        raise UserError(f"{where}: there are no rows; add the data below the header")
    timeline = None if columns.time is None else _timeline(where, scan, step)
    layout = Layout(columns.targets, columns.known, columns.static, timeline=timeline, zone=scan.zone)
    return layout, _Sorter(scan, part, timeline, duplicates).series(where)


class _Scan:
    """The first pass: finds the number of rows, the first time and the last time (µs) of each series."""

    def __init__(self, files: list[Path], columns: Columns) -> None:
        self.files, self.columns, self.numbers = files, columns, dict[str, int]()
        self.steps, self.local = Steps(), Steps()
        self.zone = None if columns.reading is None else columns.reading.zone
        self._found = np.empty((4, 0), np.int64)  # rows, earliest time, latest time, time of the last row read
        wanted = columns.keys or columns.targets[:1]
        for file in files:
            there = schema_of(file, columns.form).names
            needed = (*wanted, *columns.targets, *columns.known, *columns.static)
            if lacking := [name for name in needed if name not in there]:
                raise UserError(f"{file}: columns {', '.join(lacking)} are missing; all files need the same columns")
            for batch in batches(file, wanted, columns.keys, form=columns.form):
                self._add(_series_numbers(batch, file, columns, self.numbers), row_stamps(batch, file, columns))
        self.rows, self.low, self.high = self._found[:3, : len(self.numbers)]

    def _add(self, numbers: Int64s, stamps: Int64s | None) -> None:
        """Add rows, given by the number of their series and their time (µs)."""
        room = self._found.shape[1]
        if len(self.numbers) > room:
            more = np.repeat([[0], [_NEVER], [-_NEVER], [-_NEVER]], max(len(self.numbers) - room, room), axis=1)
            self._found = np.concatenate([self._found, more], axis=1)
        rows, low, high, latest = self._found
        np.add.at(rows, numbers, 1)
        if stamps is None:
            return
        order, series, first = _by_series(numbers)
        times = stamps[order]
        before = np.where(first, latest[series], np.concatenate([[0], times[:-1]]))
        paired = before > -_NEVER
        self.steps.add((times - before)[paired])
        end = np.ones(len(first), dtype=bool)
        end[:-1] = first[1:]
        latest[series[end]] = times[end]
        self.steps.see(stamps)
        if self.zone is not None:
            self.local.add(_local(times[paired], self.zone) - _local(before[paired], self.zone))
            self.local.see(_local(stamps, self.zone))
        np.minimum.at(low, numbers, stamps)
        np.maximum.at(high, numbers, stamps)


def _local(microseconds: Int64s, zone: str) -> Int64s:
    """Convert UTC times (µs) to local times of ``zone`` (µs)."""
    return to_local(microseconds.astype("datetime64[us]"), zone).astype(np.int64)


def _by_series(numbers: Int64s) -> tuple[Int64s, Int64s, NDArray[np.bool_]]:
    """Sort rows by series; return the order, the sorted series, and whether each row is the first of its series."""
    order = np.argsort(numbers, kind="stable")
    series = numbers[order]
    first = np.ones(len(series), dtype=bool)
    first[1:] = series[1:] != series[:-1]
    return order, series, first


def _series_numbers(batch: pa.RecordBatch, file: Path, columns: Columns, known: dict[str, int]) -> Int64s:
    """Return the number of the series of each row. Ids that are new are added to ``known`` with the next number."""
    if columns.id is None:
        return np.full(batch.num_rows, known.setdefault(file.stem, len(known)), dtype=np.int64)
    encoded = batch.column(columns.id).dictionary_encode()
    if encoded.null_count:
        raise UserError(f"{file}: id column {columns.id!r}: empty in {encoded.null_count} row(s); fill them in")
    numbers = [known.setdefault(str(name), len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _timeline(where: Path, scan: _Scan, step: Step | None) -> Timeline:
    """Return the grid of the scanned times; UserError if the time step is unknown, or most of the grid is empty."""
    origin = np.datetime64(int(scan.low.min()), "us")
    timeline = scan.steps.timeline(origin, step)
    if scan.zone is not None:
        local = scan.local.timeline(to_local(np.array([origin]), scan.zone)[0], step)
        if local is not None and local.step.whole_days:
            timeline = replace(local, zone=scan.zone)
    if timeline is None:
        raise UserError(f"{where}: no series has two times to show the time step; give --step, or --time none")
    if scan.steps.backward:
        logger.info("%s: sorting by time; %d rows are out of order in their series", where, scan.steps.backward)
    grid = int((_positions(timeline, scan.high) - _positions(timeline, scan.low) + 1).sum())
    if grid > _MOST_GAPS * int(scan.rows.sum()):
        raise UserError(
            f"{where}: with a time step of {timeline.step}, {int(scan.rows.sum())} rows become {grid}, most of them "
            "without values; give the right --step, or --time none to use the rows in the order of the file"
        )
    return timeline


def _positions(timeline: Timeline, microseconds: Int64s) -> Int64s:
    """Return the positions of times (µs) on the grid."""
    return timeline.positions(microseconds.astype("datetime64[us]"))[0]


class _Sorter:
    """The second pass: sorts all rows into a file on disk, then reads the series from it."""

    def __init__(self, scan: _Scan, part: Path, timeline: Timeline | None, duplicates: str) -> None:
        self.scan, self.part, self.timeline, self.duplicates = scan, part, timeline, duplicates
        self.ids = list(scan.numbers)
        # For each series: first position on the timeline, number of rows on the grid, first row on disk.
        self.first = _positions(timeline, scan.low) if timeline else np.zeros_like(scan.rows)
        self.length = _positions(timeline, scan.high) - self.first + 1 if timeline else scan.rows
        self.offset = np.cumsum(self.length) - self.length
        self.static = _Static(scan.columns.static, len(self.ids))
        self._next = np.zeros_like(scan.rows)

    def series(self, where: Path) -> Iterator[Series]:
        """Sort the rows, log repeated rows and gaps, and yield the series one after another."""
        rows, length, targets = self.scan.rows, self.length, len(self.scan.columns.targets)
        table = _Table(self.part, int(length.sum()), targets + len(self.scan.columns.known))
        try:
            repeated = self._sort(table)
            if repeated:
                logger.warning("%s: %d repeated times within a series; the last row of each is used", where, repeated)
            gaps = int(length.sum() - rows.sum()) + repeated
            if self.timeline is not None and gaps:
                logger.warning(
                    "%s: %d time steps of %s are missing, in %d series; rows without values are added for them",
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
        """Write every row to its position in ``table``; return how many rows repeat a time of their series."""
        columns, repeated = self.scan.columns, 0
        data = [*columns.targets, *columns.known]
        for file in self.scan.files:
            schema = schema_of(file, columns.form)
            text = {*columns.keys, *(name for name in columns.static if not is_number(schema.field(name).type))}
            for batch in batches(file, [*columns.keys, *columns.static, *data], text, form=columns.form):
                numbers = _series_numbers(batch, file, columns, self.scan.numbers)
                stamps = row_stamps(batch, file, columns)
                where = self.offset[numbers] + self._position(numbers, stamps, file)
                twice = table.mark_written(where)
                if twice.any() and self.duplicates == "error":
                    row = int(np.argmax(twice))
                    time = _time(stamps[row]) if stamps is not None else "a time"
                    raise UserError(
                        f"{file}: series {self.ids[int(numbers[row])]!r} has {time} more than once ({int(twice.sum())} "
                        "such rows in this part of the file); remove them, or give --duplicates last"
                    )
                repeated += int(twice.sum())
                self.static.add(batch, numbers, file, self.ids)
                table.write(where, numbers_of(batch, data, file))
        return repeated

    def _position(self, numbers: Int64s, stamps: Int64s | None, file: Path) -> Int64s:
        """Return the position of each row in its series: by time, or without times in the order of the rows."""
        if self.timeline is None or stamps is None:
            order, series, first = _by_series(numbers)
            begins = np.flatnonzero(first)
            counts = np.diff(np.append(begins, len(series)))
            position = np.empty_like(numbers)
            position[order] = np.arange(len(series)) - np.repeat(begins, counts) + self._next[series]
            self._next[series[begins]] += counts
            return position
        position, valid = self.timeline.positions(stamps.astype("datetime64[us]"))
        if not valid.all():
            row = int(np.argmin(valid))
            cure = "correct the times, give --step, or --time none to use the rows in the order of the file"
            if self.timeline.zone is not None:
                cure += (
                    f". Days are counted in local time at {self.timeline.zone}: if the UTC offset of the rows changes"
                    " with the season, write local times without an offset"
                )
            raise UserError(
                f"{file}: series {self.ids[int(numbers[row])]!r}: {_time(stamps[row])} is not a whole number of time "
                f"steps of {self.timeline.step} from {self.timeline.origin} ({int((~valid).sum())} such rows in this "
                f"part of the file); {cure}"
            )
        return position - self.first[numbers]


def _time(microseconds: Any) -> str:
    """Format a time (µs) for a message."""
    return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


class _Static:
    """The value of each static column for each series by number; raises UserError if a value changes."""

    def __init__(self, names: list[str], series: int) -> None:
        self.names = names
        self.codes: list[dict[Any, int]] = [{} for _ in names]
        self.of_series = np.full((len(names), series), -1, dtype=np.int64)

    def add(self, batch: pa.RecordBatch, numbers: Int64s, file: Path, ids: list[str]) -> None:
        """Add the rows of a batch."""
        for name, known, stored in zip(self.names, self.codes, self.of_series, strict=True):
            encoded = batch.column(name).dictionary_encode(null_encoding="encode")
            # None replaces NaN, which is not equal to itself and thus not usable as a key.
            values = (None if value != value else value for value in encoded.dictionary.to_pylist())
            local = [known.setdefault(value, len(known)) for value in values]
            codes = np.array(local, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
            new = stored[numbers] < 0
            stored[numbers[new]] = codes[new]
            wrong = stored[numbers] != codes
            if wrong.any():
                series = ids[int(numbers[int(np.argmax(wrong))])]
                raise UserError(
                    f"{file}: static column {name!r} is not constant within series {series!r}; leave it out of "
                    "--static, or name it with --known if it is known in advance"
                )


class _Table:
    """A file of rows (n, width) float64, NaN until written. It is mapped into memory only during each access."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.data, self.mark, self.shape = folder / "rows.tmp", folder / "taken.tmp", (rows, width)
        with open(self.data, "wb") as stream:
            empty = np.full(((1 << 18) // max(width, 1) + 1, width), np.nan)
            for begin in range(0, rows, len(empty)):
                empty[: rows - begin].tofile(stream)
        with open(self.mark, "wb") as stream:
            stream.truncate(max(rows, 1))

    def mark_written(self, where: Int64s) -> NDArray[np.bool_]:
        """Mark the rows ``where`` as written; return which were marked before or earlier in ``where``."""
        mark = np.memmap(self.mark, dtype=np.bool_, mode="r+")
        again = mark[where].copy()
        _, first = np.unique(where, return_index=True)
        later = np.ones(len(where), dtype=bool)
        later[first] = False
        mark[where] = True
        return again | later

    def write(self, where: Int64s, rows: NDArray[np.float64]) -> None:
        """Write ``rows`` to the positions ``where``; of several rows for one position, the last is kept."""
        if not len(where):
            return
        table = np.memmap(self.data, dtype=np.float64, mode="r+", shape=self.shape)
        last = len(where) - 1 - np.unique(where[::-1], return_index=True)[1]
        table[where[last]] = rows[last]

    def read(self, begin: int, count: int) -> NDArray[np.float64]:
        """Return rows [begin, begin + count)."""
        width = self.shape[1]
        found = np.fromfile(self.data, dtype=np.float64, count=count * width, offset=8 * begin * width)
        return found.reshape(count, width)

    def remove(self) -> None:
        self.data.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)


def with_reading(files: list[Path], columns: Columns) -> Columns:
    """Return ``columns`` with ``reading`` set. All rows are read for this, except if the dates are ISO 8601.

    Raises:
        UserError: if the time column contains numbers that are not times, or ambiguous dates.
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
            f"{where}: it contains numbers, not dates; correct it, set --time-format (s, ms, us or ns for numbers "
            "since 1970), or give --time none to use the rows in the order of the file"
        )
    return replace(columns, reading=reading)


def _parts(files: list[Path], name: str, form: TableFormat) -> Iterator[pd.Series]:
    """Yield the column ``name`` of all files, a batch at a time."""
    for file in files:
        for batch in batches(file, [name], [name], form=form):
            yield batch.column(name).to_pandas()


def _plain(column: pd.Series, where: str, form: TableFormat) -> Reading | None:
    """Return the reading if the first batch settles it, whatever rows follow; else None."""
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
    """Return the times of a batch (µs); None without a time column. UserError if a value is not a time."""
    if columns.time is None or columns.reading is None:
        return None
    column = batch.column(columns.time).to_pandas()
    stamps = columns.reading.stamps(column)
    bad = np.isnat(stamps)
    if bad.any():
        value = column.iloc[int(np.argmax(bad))]
        raise UserError(
            f"{file}: time column {columns.time!r}: {value!r} is not a date; correct it, or give --time-format, "
            "or --time none"
        )
    return stamps.astype(np.int64)


def find_dates(file: Path, ids: str | None, names: Sequence[str], form: TableFormat) -> str | None:
    """Return the only one of the columns ``names`` that contains dates, or None if not exactly one does.

    None also if no series has more than one row in the first batch, since the table is then wide.
    """
    wanted = [*names, *([] if ids is None else [ids])]
    batch = next(iter(batches(file, wanted, wanted, form=form)), None)
    if batch is None or (ids is not None and len(batch.column(ids).unique()) == batch.num_rows):
        return None
    found = [name for name in names if are_dates(batch.column(name).to_pandas())]
    return found[0] if len(found) == 1 else None
