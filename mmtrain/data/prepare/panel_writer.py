"""Writing a panel: series come one after the other and go to shards; never more than a shard is in memory."""

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
#: What rounding to float32 may change, as a part of the range of a column.
_TOLERATED = 1e-5


class Series(NamedTuple):
    """One series as its source gives it: ``values`` (T, C) and ``known`` (T, K), NaN where there is nothing.

    ``first``: the place of row 0 on the timeline. ``static``: a text or a number for each static column.
    """

    id: str
    values: Numbers
    known: Numbers
    first: int = 0
    static: tuple[Any, ...] = ()
    group: int = 0


@dataclass
class Counts:
    """Counts of what was written and what was filled, for meta.json."""

    series: int = 0
    rows: int = 0
    ahead: int = 0  # rows behind the last target in which only the known columns hold anything
    holes: int = 0  # values missing, and left so
    filled: int = 0
    known_filled: int = 0
    empty: int = 0  # series without a single value, left out
    shortest: int = 0
    longest: int = 0


@dataclass(frozen=True)
class Layout:
    """The columns of a panel, and what its series share. ``shared`` (G, T, K2)."""

    columns: Sequence[str]
    known: Sequence[str] = ()
    static: Sequence[str] = ()
    shared_columns: Sequence[str] = ()
    shared: Numbers = field(default_factory=lambda: np.empty((1, 0, 0)))
    timeline: Timeline | None = None
    zone: str | None = None  # the time zone that the files name; the times of ``timeline`` are in UTC then


class PanelWriter:
    """Collects series into ``folder``; :meth:`finish` writes the rest and the scalers, and opens it.

    ``missing``: keep holes (for data.missing=mask), or fill them. Rows before a series' first value and behind its last
    are cut off, except those behind in which all known columns are given. Holes in known columns are filled with the
    last value before, at the beginning with the first after.
    """

    def __init__(self, folder: Path, layout: Layout, *, missing: str = "keep", shard_bytes: int = 64 << 20) -> None:
        if missing not in MISSING:
            raise UserError(f"--missing {missing}: one of {', '.join(MISSING)}{nearest(missing, MISSING)}")
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
        """Take a series; its arrays are copied."""
        seen: NDArray[np.bool_] = np.asarray(np.isfinite(series.values).any(axis=1))
        if not seen.any():
            self.counts.empty += 1
            return
        begin, end = int(np.argmax(seen)), len(seen) - int(np.argmax(seen[::-1]))
        stop = end  # of the rows behind, those from the first on that have all known columns stay
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
        bad = ~np.isfinite(values)
        values[bad] = np.nan
        if self.missing == "keep":
            self.counts.holes += int(bad.sum())
        else:
            self.counts.filled += int(bad.sum())
            for place in np.flatnonzero(bad.any(axis=0)).tolist():
                if not fill_column(values[:, place], bad[:, place], self.missing):
                    raise UserError(
                        f"series {name!r}: column {self.layout.columns[place]!r} begins with a hole, so --missing "
                        f"{self.missing} has nothing to fill it with; use --missing zero, or keep with "
                        "data.missing=mask"
                    )
        bad = ~np.isfinite(known)
        for place in np.flatnonzero(bad.any(axis=0)).tolist():
            column = bad[:, place]
            if column.all():
                raise UserError(
                    f"series {name!r}: the known column {self.layout.known[place]!r} holds nothing at all: leave the "
                    "column out of --known, or the series out of the data"
                )
            carry(known[:, place], column)
        self.counts.known_filled += int(bad.sum())

    def _flush(self) -> None:
        number = len(self._numbers["shards"])
        for name, place in (("values", 0), ("known", 1)):
            width = len(self.layout.known if place else self.layout.columns)
            if width:
                whole = np.concatenate([arrays[place] for arrays in self._shard])
                _save(self.folder / f"{name}-{number:05d}.npy", whole)
        self._numbers["shards"].append(len(self._shard))
        self._shard, self._held = [], 0

    def finish(self, split: SplitRule, made_of: Mapping[str, Any]) -> dict[str, Any]:
        """Write what is left; the content of meta.json, in which ``made_of`` says what the panel was made of.

        Raises:
            UserError: no series, an id that comes twice, a split that does not fit.
        """
        if not self._ids:
            raise UserError(f"{made_of.get('source')}: no series with a single value in it")
        if self._shard:
            self._flush()
        ids = np.array(self._ids, dtype=np.str_)
        known, counts = np.unique(ids, return_counts=True)
        if len(known) < len(ids):
            twice = known[int(np.argmax(counts))]
            raise UserError(
                f"{made_of.get('source')}: {len(ids) - len(known)} ids come more than once, such as {twice}"
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
                f"--calendar: it has {shared.shape[1]} steps from the first of the data on, and the series go on for "
                f"{needed}: give a longer one"
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
            raise UserError(f"--split: {split} leaves no rows to train on in any series")
        scalers = fit_scalers(panel, borders[:, 0])
        _save(self.folder / "scaler-mean.npy", scalers.mean)
        _save(self.folder / "scaler-std.npy", scalers.std)
        _save(self.folder / "known-mean.npy", scalers.known.mean)
        _save(self.folder / "known-std.npy", scalers.known.std)
        return meta

    def _write_static(self) -> dict[str, list[str]]:
        """The categories of the text columns; each column is written as codes or numbers."""
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
    """(..., C): in float32, unless that would lose what changes in a column, such as a counter with a large offset."""
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
    """Write, make durable, and let the system forget the pages: a panel may be larger than memory."""
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
    """Write ``out`` complete or not at all; a panel made of the same source with the same settings is left alone.

    ``open_source``: from a folder for temporary files, what the panel has, and its series as a stream.
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
