"""Where training, validation and test rows meet, and the standardisation that is fitted on the training rows.

A split is that of a named benchmark, or it is given by ratio, by date, or by steps from the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.timeline import to_utc
from mmtrain.errors import UserError, nearest

if TYPE_CHECKING:
    from mmtrain.config import SeriesDataConfig
    from mmtrain.data.series.timeline import Int64s, Stamps, Timeline

# The benchmark's months of 30 days: 12 / 4 / 4 (Zhou et al. 2021, Informer).
NAMED = {"etth": (8640, 2880, 2880), "ettm": (34560, 11520, 11520)}
RATIOS = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Split:
    """Rows [0, a) train, [a, b) validate, [b, c) test. A window belongs to the split that holds all its targets."""

    borders: tuple[int, int, int]

    @classmethod
    def of(cls, spec: str | Sequence[float], rows: int) -> Split:
        """``"etth"``, ``"ettm"``, or three parts of the whole such as (0.7, 0.1, 0.2).

        Parts follow the benchmark: int(T · train) and int(T · test) rows, validation takes the rest.
        """
        if isinstance(spec, str):
            if spec not in NAMED:
                raise UserError(f"data.split={spec!r}: {' or '.join(NAMED)} or three parts{nearest(spec, NAMED)}")
            a, b, c = NAMED[spec]
            if rows < a + b + c:
                raise UserError(
                    f"data.split={spec} needs {a + b + c} rows, the table has {rows}:"
                    " use data.split=ratio data.ratios=[...]"
                )
            return cls((a, a + b, a + b + c))
        parts = [float(part) for part in spec]
        if len(parts) != 3 or min(parts) < 0 or parts[0] <= 0 or abs(sum(parts) - 1) > 1e-6:
            raise UserError(f"data.ratios={list(spec)}: three parts (train, validation, test) that add up to 1")
        train, test = int(rows * parts[0]), int(rows * parts[2])
        return cls((train, rows - test, rows))

    def rows(self, name: str, lookback: int, horizon: int) -> tuple[int, int]:
        """First and last+1 row of "train", "val" or "test", with the look-back rows before its first target.

        Raises UserError if not one window fits.
        """
        a, b, c = self.borders
        begin, stop = {"train": (0, a), "val": (a, b), "test": (b, c)}[name]
        start = begin if name == "train" else begin - lookback
        if start < 0 or stop - start < lookback + horizon:
            raise UserError(
                f"the {name} split has {stop - begin} of {c} rows (after {begin}): too short for one window of "
                f"look-back {lookback} + horizon {horizon}; use a shorter model.lookback or model.horizon, another "
                "data.split or more rows"
            )
        return start, stop


#: The rounding of the values of a column, relative to their size: a column that varies less than that is constant.
NOISE = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12}
#: Rows that are standardised at once: it takes some float64 memory for each.
_ROWS = 4096


@dataclass(frozen=True)
class Scaler:
    """Standardisation per column, in float64: a large mean may hide the small changes of a counter from float32.

    Columns that do not vary keep their scale (std 1).
    """

    mean: NDArray[np.float64]  # (M,)
    std: NDArray[np.float64]  # (M,)

    @classmethod
    def fit(cls, values: NDArray[np.floating]) -> Scaler:
        """Mean and population deviation of the rows given: the training rows, never others, and without holes."""
        deviation: Any = np.std
        average: Any = np.mean
        if np.isnan(values).any():
            deviation, average = np.nanstd, np.nanmean
            values = np.where(np.isnan(values).all(axis=0), 0, values)  # a column without a number: mean 0, deviation 1
        std = deviation(values, axis=0, dtype=np.float64)
        # A constant column's deviation is rounding noise of its mean, not exactly 0.
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        constant = high - low <= NOISE[np.dtype(np.float64)] * np.maximum(np.abs(low), np.abs(high))
        std[constant | (std.astype(np.float32) == 0)] = 1.0
        return cls(average(values, axis=0, dtype=np.float64), std)

    def transform(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """(..., M) → standardised, float32."""
        rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
        made = np.empty(rows.shape, dtype=np.float32)
        for begin in range(0, len(rows), _ROWS):
            made[begin : begin + _ROWS] = (rows[begin : begin + _ROWS] - self.mean) / self.std
        return made.reshape(values.shape)

    def inverse(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """(..., M) standardised → the table's units."""
        return values * self.std + self.mean

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any], where: str | Path = "assets.json") -> Scaler:
        """The scaler of :meth:`to_dict`. Raises UserError, which begins with ``where``, for one that is damaged."""
        try:
            mean, std = (np.asarray(saved[name], dtype=np.float64) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the scaler is damaged ({error!r}); restore the file") from None
        check_scaler(mean, std, f"{where}: the scaler is damaged", "restore the file, or train or export again")
        return cls(mean, std)


def check_scaler(mean: NDArray[np.floating], std: NDArray[np.floating], fault: str, cure: str) -> None:
    """Raise UserError unless the means are finite numbers and the deviations are finite numbers above 0."""
    if mean.shape != std.shape:
        raise UserError(f"{fault}: means of shape {mean.shape} and deviations of shape {std.shape}; {cure}")
    for name, wrong in (("mean", ~np.isfinite(mean)), ("deviation", ~(np.isfinite(std) & (std > 0)))):
        if wrong.any():
            place = tuple(int(number) for number in np.argwhere(wrong)[0])
            value = (mean if name == "mean" else std)[place]
            raise UserError(f"{fault}: number {', '.join(map(str, place))} has the {name} {value}; {cure}")


@dataclass(frozen=True)
class SplitRule:
    """``kind``: etth, ettm, ratio (three ``parts``), date (``dates``: the first of validation and of test) or last.

    ``last``: steps of validation and of test, counted from the end of each series.
    """

    kind: str
    parts: tuple[float, ...] = ()
    dates: tuple[str, ...] = ()
    last: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: SeriesDataConfig) -> SplitRule:
        """From the keys ``split``, ``ratios``, ``dates`` and ``last`` of the section ``data``."""
        return cls.make(data.split, data.ratios, data.dates, data.last)

    @classmethod
    def make(cls, kind: str, parts: Any = None, dates: Any = None, last: Any = None) -> SplitRule:
        """Only what ``kind`` uses is kept, so that equal splits are equal."""
        if kind == "ratio":
            return cls(kind, parts=tuple(float(part) for part in parts or ()))
        if kind == "date":
            return cls(kind, dates=tuple(str(date) for date in dates or ()))
        return cls(kind, last=tuple(int(steps) for steps in last or ())) if kind == "last" else cls(kind)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> SplitRule:
        return cls.make(saved["split"], saved.get("parts"), saved.get("dates"), saved.get("last"))

    def to_json(self) -> dict[str, Any]:
        used = {"ratio": ("parts", self.parts), "date": ("dates", self.dates), "last": ("last", self.last)}
        return {"split": self.kind, **({used[self.kind][0]: list(used[self.kind][1])} if self.kind in used else {})}

    def cut_table(self, rows: int, stamps: Stamps | None, file: Path, zone: str | None = None) -> Split:
        """The split of a table of ``rows`` rows with times ``stamps`` (T,), or None where it has none.

        ``zone``: that of the dates; the times are in UTC then.

        Raises:
            UserError: for a split that leaves no rows to train on, or dates for a table without sorted times.
        """
        if self.kind == "ratio":
            return Split.of(self.parts, rows)
        if self.kind not in ("date", "last"):
            return Split.of(self.kind, rows)
        if self.kind == "last":
            val, test = self._last()
            borders = (rows - val - test, rows - test, rows)
        else:
            if stamps is None:
                raise UserError(f"{file}: data.split=date needs a time column: set data.time_column, or split by ratio")
            if (np.diff(stamps.astype(np.int64)) < 0).any():
                raise UserError(f"{file}: data.split=date needs rows in the order of their times: sort the table")
            a, b = (int(np.searchsorted(stamps, date)) for date in self._dates(zone))
            borders = (a, b, rows)
        if borders[0] < 1:
            raise UserError(f"{file}: {self} leaves none of the {rows} rows to train on")
        return Split(borders)

    def cut_panel(self, lengths: Int64s, first: Int64s, timeline: Timeline | None, zone: str | None = None) -> Int64s:
        """Borders (S, 3) int64: of each series the rows [0, a) train, [a, b) validate, [b, c) test.

        Args:
            lengths: (S,) rows of each series.
            first: (S,) its first place on ``timeline``.
            zone: that of the dates; the times are in UTC then.

        Raises:
            UserError: for dates and no timeline, or a split that panels do not have.
        """
        if self.kind == "ratio":
            Split.of(self.parts, 1000)  # says what is wrong with the parts
            train, _, test = ((lengths * part).astype(np.int64) for part in self.parts)
            return np.stack([train, lengths - test, lengths], axis=1)
        if self.kind == "last":
            val, held_out = self._last()
            after = np.maximum(lengths - held_out, 0)
            return np.stack([np.maximum(after - val, 0), after, lengths], axis=1)
        if self.kind != "date":
            raise UserError(f"data.split={self.kind} is for one table: for a panel use ratio, date or last")
        if timeline is None:
            raise UserError("data.split=date: this panel was prepared without times: use data.split=ratio or last")
        a, b = (np.clip(_place_from(timeline, date) - first, 0, lengths) for date in self._dates(zone))
        return np.stack([a, b, lengths], axis=1)

    def _last(self) -> tuple[int, int]:
        if len(self.last) != 2 or min(self.last) < 0:
            raise UserError(f"data.last={list(self.last)}: give the steps of validation and of test, such as [28, 28]")
        return self.last[0], self.last[1]

    def _dates(self, zone: str | None) -> tuple[np.datetime64, np.datetime64]:
        """The dates, in UTC where there is a zone."""
        try:
            made = [np.datetime64(date.strip().replace(" ", "T"), "us") for date in self.dates]
        except ValueError:
            made = []
        if len(made) != 2 or not made[0] <= made[1]:
            raise UserError(
                f"data.dates={list(self.dates)}: give the first date of validation and that of test, such as "
                "[2017-07-01, 2017-10-01]"
            )
        if zone is not None:
            made = list(to_utc(np.array(made), zone))
        return made[0], made[1]

    def __str__(self) -> str:
        value = {"ratio": self.parts, "date": self.dates, "last": self.last}.get(self.kind)
        key = {"ratio": "ratios", "date": "dates", "last": "last"}.get(self.kind)
        return f"data.split={self.kind}" + (f" data.{key}={list(value)}" if value is not None else "")


def guess_split(name: str) -> SplitRule:
    """The split which the benchmarks use for a table of this name: ETTh*, ETTm*, else 70/10/20 %."""
    found = re.match(r"ett([hm])\d", name.lower())
    return SplitRule(f"ett{found[1]}") if found else SplitRule("ratio", parts=RATIOS)


def _place_from(timeline: Timeline, date: np.datetime64) -> int:
    """The first place of the grid at ``date`` or later."""
    place = int(timeline.places(np.array([date]))[0][0])
    return place if timeline.stamps(place, 1)[0] >= date else place + 1
