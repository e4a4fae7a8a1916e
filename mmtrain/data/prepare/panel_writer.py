"""Write a panel from a stream of series. At most one shard is in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.prepare.output import Origin, Prepared, existing, prepared_folder, write_meta
from mmtrain.data.series.panel import FORMAT, KIND, open_panel
from mmtrain.data.series.panel_inputs import fit_scalers
from mmtrain.data.series.split import NOISE, SplitRule
from mmtrain.data.series.table import FILLS, carry, fill_column
from mmtrain.data.series.timeline import Timeline
from mmtrain.data.series.windows import Numbers
from mmtrain.errors import UserError, nearest

MISSING = ("keep", *FILLS)
#: Largest accepted rounding error of float32, relative to the range of a column.
_TOLERATED = 1e-5


class Series(NamedTuple):
    """One series to be written to a panel."""

    id: str
    values: Numbers  # (T, C) targets, NaN where missing
    known: Numbers  # (T, K) columns known in advance, NaN where missing
    first: int = 0  # position of row 0 on the timeline
    static: tuple[Any, ...] = ()  # a text or a number for each static column
    group: int = 0  # index of the group of series in ``Layout.shared``


@dataclass
class Counts:
    """Counts of series, rows and missing values, for meta.json."""

    series: int = 0
    rows: int = 0  # rows with targets
    ahead: int = 0  # rows after the last target, with known columns only
    holes: int = 0  # missing values that were kept
    filled: int = 0  # missing values that were filled
    known_filled: int = 0  # missing values of known columns, which are always filled
    empty: int = 0  # series without any value, which are left out
    shortest: int = 0  # rows of the shortest series
    longest: int = 0


@dataclass(frozen=True)
class Layout:
    """The columns of a panel, and the data that its series share."""

    columns: Sequence[str]  # targets
    known: Sequence[str] = ()
    static: Sequence[str] = ()
    shared_columns: Sequence[str] = ()
    shared: Numbers = field(default_factory=lambda: np.empty((1, 0, 0)))  # (G, T, K2), for each group of series
    timeline: Timeline | None = None
    zone: str | None = None  # the time zone that the files name; the times of ``timeline`` are in UTC then


class PanelWriter:
    """Writes series into shards in ``folder``; :meth:`finish` writes the other files and the scalers.

    Rows before the first value and after the last value of a series are removed, except rows after the last value in
    which all known columns have values. Missing values of known columns are filled with the last value before, or else
    the first value after.

    Args:
        missing: "keep" keeps missing values (train with data.missing=mask); ffill, interpolate or zero fills them.
        shard_bytes: approximate size of a shard.
    """

    def __init__(self, folder: Path, layout: Layout, *, missing: str = "keep", shard_bytes: int = 64 << 20) -> None:
        if missing not in MISSING:
            raise UserError(f"--missing {missing}: must be one of {', '.join(MISSING)}{nearest(missing, MISSING)}")
        self.folder, self.layout, self.missing = folder, layout, missing
        width = 4 * (len(layout.columns) + len(layout.known))
        self.shard_rows = max(1, shard_bytes // width)
        self.counts = Counts()
        self._ids: list[str] = []
        self._numbers: dict[str, list[int]] = {name: [] for name in ("lengths", "rows", "first", "groups", "shards")}
        self._static: list[list[Any]] = [[] for _ in layout.static]
        self._shard: list[tuple[Numbers, Numbers]] = []
        self._held = 0

    def add(self, series: Series) -> None:
        """Add a series; its arrays are copied."""
        seen: NDArray[np.bool_] = np.asarray(np.isfinite(series.values).any(axis=1))
        if not seen.any():
            self.counts.empty += 1
            return
        begin, end = int(np.argmax(seen)), len(seen) - int(np.argmax(seen[::-1]))
        stop = end  # plus the rows after the last value, up to the first one without all known columns
        if series.known.shape[1]:
            given: NDArray[np.bool_] = np.asarray(np.isfinite(series.known[end:]).all(axis=1))
            stop += len(given) if given.all() else int(np.argmin(given))
        values, known = series.values[begin:stop].copy(), series.known[begin:stop].copy()
        self._fill(series.id, values[: end - begin], known)
        values[end - begin :] = np.nan
        self._ids.append(series.id)
        for name, number in (
            ("lengths", end - begin),
            ("rows", stop - begin),
            ("first", series.first + begin),
            ("groups", series.group),
        ):
            self._numbers[name].append(number)
        for kept, value in zip(self._static, series.static, strict=True):
            kept.append(value)
        self.counts.series += 1
        self.counts.rows += end - begin
        self.counts.ahead += stop - end
        if self._held and self._held + len(values) > self.shard_rows:
            self._flush()
        self._shard.append((_stored(values), _stored(known)))
        self._held += len(values)

    def _fill(self, name: str, values: Numbers, known: Numbers) -> None:
        """Count and fill the missing values of the series ``name`` in place."""
        bad = ~np.isfinite(values)
        values[bad] = np.nan
        if self.missing == "keep":
            self.counts.holes += int(bad.sum())
        else:
            self.counts.filled += int(bad.sum())
            for number in np.flatnonzero(bad.any(axis=0)).tolist():
                if not fill_column(values[:, number], bad[:, number], self.missing):
                    raise UserError(
                        f"series {name!r}: the first value of column {self.layout.columns[number]!r} is missing, and "
                        f"--missing {self.missing} cannot fill it; use --missing zero, or --missing keep and train "
                        "with data.missing=mask"
                    )
        bad = ~np.isfinite(known)
        for number in np.flatnonzero(bad.any(axis=0)).tolist():
            column = bad[:, number]
            if column.all():
                raise UserError(
                    f"series {name!r}: the known column {self.layout.known[number]!r} has no values; leave the column "
                    "out of --known, or the series out of the data"
                )
            carry(known[:, number], column)
        self.counts.known_filled += int(bad.sum())

    def _flush(self) -> None:
        """Write the collected series as one shard."""
        number = len(self._numbers["shards"])
        for name, kind in (("values", 0), ("known", 1)):
            width = len(self.layout.known if kind else self.layout.columns)
            if width:
                whole = np.concatenate([arrays[kind] for arrays in self._shard])
                _save(self.folder / f"{name}-{number:05d}.npy", whole)
        self._numbers["shards"].append(len(self._shard))
        self._shard, self._held = [], 0

    def finish(self, split: SplitRule, made_of: Mapping[str, Any]) -> dict[str, Any]:
        """Write the last shard, the other arrays, meta.json and the scalers; return the content of meta.json.

        Args:
            split: the split that the scalers are fitted for.
            made_of: entries of meta.json on the source and the settings.

        Raises:
            UserError: if there are no series, an id occurs twice, or the split leaves no training rows.
        """
        if not self._ids:
            raise UserError(f"{made_of.get('source')}: no series has any value; check the target columns (--columns)")
        if self._shard:
            self._flush()
        ids = np.array(self._ids, dtype=np.str_)
        known, counts = np.unique(ids, return_counts=True)
        if len(known) < len(ids):
            twice = known[int(np.argmax(counts))]
            raise UserError(
                f"{made_of.get('source')}: {len(ids) - len(known)} ids are repeated, such as {twice}; give each series "
                "its own id"
            )
        lengths = self._numbers["lengths"]
        self.counts.shortest, self.counts.longest = min(lengths), max(lengths)
        _save(self.folder / "ids.npy", ids)
        for name, numbers in self._numbers.items():
            _save(self.folder / f"{name}.npy", np.array(numbers, dtype=np.int64))
        layout, line = self.layout, self.layout.timeline
        shared = _stored(layout.shared)
        needed = max(f + n for f, n in zip(self._numbers["first"], self._numbers["rows"], strict=True))
        if shared.shape[2] and shared.shape[1] < needed:
            raise UserError(
                f"--calendar: covers {shared.shape[1]} time steps from the first time of the data on, but the series "
                f"need {needed}; give a longer calendar"
            )
        _save(self.folder / "shared.npy", shared)
        meta = {
            "kind": KIND,
            "format": FORMAT,
            "columns": list(layout.columns),
            "known": list(layout.known),
            "shared": list(layout.shared_columns),
            "static": list(layout.static),
            "categories": self._write_static(),
            "timeline": line and line.to_json(),
            **({} if layout.zone is None else {"zone": layout.zone}),
            "shards": len(self._numbers["shards"]),
            "holes": self.counts.holes,
            "split": split.to_json(),
            "counts": dict(vars(self.counts)),
            **made_of,
        }
        write_meta(self.folder, meta)
        panel = open_panel(self.folder)
        borders = split.cut_panel(panel.lengths, panel.first, panel.timeline, panel.zone)
        if not borders[:, 0].any():
            raise UserError(f"--split: {split} leaves no training rows in any series; give another split")
        scalers = fit_scalers(panel, borders[:, 0])
        _save(self.folder / "scaler-mean.npy", scalers.mean)
        _save(self.folder / "scaler-std.npy", scalers.std)
        _save(self.folder / "known-mean.npy", scalers.known.mean)
        _save(self.folder / "known-std.npy", scalers.known.std)
        return meta

    def _write_static(self) -> dict[str, list[str]]:
        """Write each static column as codes or numbers; return the categories of the text columns."""
        categories: dict[str, list[str]] = {}
        for number, (name, kept) in enumerate(zip(self.layout.static, self._static, strict=True)):
            array: NDArray[Any]
            if any(isinstance(value, str) for value in kept):
                found, codes = np.unique([str(value) for value in kept], return_inverse=True)
                categories[name], array = found.tolist(), codes.astype(np.int32)
            else:
                array = np.array([np.nan if value is None else value for value in kept], dtype=np.float64)
            _save(self.folder / f"static-{number:03d}.npy", array)
        return categories


def _stored(values: Numbers) -> Numbers:
    """Return ``values`` (..., C) as float32, or unchanged if float32 would lose the changes of a large value."""
    small = values.astype(np.float32)
    if np.array_equal(small, values, equal_nan=True):
        return small
    columns = values.reshape(-1, values.shape[-1])
    rounded = ((small.reshape(columns.shape) != columns) & ~np.isnan(columns)).any(axis=0)
    low, high = np.fmin.reduce(columns, axis=0), np.fmax.reduce(columns, axis=0)
    size, rounding = np.fmax(np.abs(low), np.abs(high)), float(np.finfo(np.float32).eps) / 2
    varies = high - low > NOISE[np.dtype(np.float64)] * size
    lossy = rounded & varies & (rounding * size > _TOLERATED * (high - low))
    return values if lossy.any() else small


def _save(file: Path, array: NDArray[Any]) -> None:
    """Write an array and flush it to disk."""
    with open(file, "wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())


def write_panel(
    out: Path,
    open_source: Callable[[Path], tuple[Layout, Iterator[Series]]],
    *,
    origin: Origin,
    settings: Mapping[str, Any],
    split: SplitRule,
    missing: str,
    shard_bytes: int = 64 << 20,
    force: bool = False,
) -> Prepared:
    """Write a panel to ``out``, completely or not at all. An existing panel of the same source and settings is reused.

    Args:
        open_source: function that takes a folder for temporary files, and returns the layout and a stream of series.
        origin, settings: source and settings for meta.json.
        split: the split that the scalers are fitted for.
        missing, shard_bytes: see :class:`PanelWriter`.
        force: replace an existing ``out``.
    """
    settings = {**settings, "split": split.to_json()}
    if (done := existing(out, origin, settings, force=force, kind=KIND, format=FORMAT)) is not None:
        return done
    with prepared_folder(out, force=force) as part:
        layout, series = open_source(part)
        writer = PanelWriter(part, layout, missing=missing, shard_bytes=shard_bytes)
        for one in series:
            writer.add(one)
        meta = writer.finish(split, {**origin.to_meta(), "settings": settings})
    return Prepared(out, meta, fresh=True)
