"""Train, validation and test splits of time series, and standardisation by the training rows.

A split is named after a benchmark, or given by ratios, by dates, or by numbers of time steps from the end.
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

# Rows of train, validation and test in the benchmark: 12 / 4 / 4 months of 30 days (Zhou et al. 2021, Informer).
NAMED = {"etth": (8640, 2880, 2880), "ettm": (34560, 11520, 11520)}
RATIOS = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Split:
    """The split of a table: rows [0, a) are train, [a, b) validation, [b, c) test.

    A window belongs to the split that contains all its targets.
    """

    borders: tuple[int, int, int]

    @classmethod
    def of(cls, spec: str | Sequence[float], rows: int) -> Split:
        """Split a table of T = ``rows`` rows.

        Args:
            spec: ``"etth"``, ``"ettm"``, or three ratios such as (0.7, 0.1, 0.2). As in the benchmark, training gets
                int(T · train) rows, test int(T · test) rows, and validation the rest.

        Raises:
            UserError: for an invalid ``spec`` or too few rows.
        """
        if isinstance(spec, str):
            if spec not in NAMED:
                raise UserError(
                    f"data.split={spec!r}: must be {', '.join(NAMED)} or three ratios such as 0.7,0.1,0.2"
                    f"{nearest(spec, NAMED)}"
                )
            a, b, c = NAMED[spec]
            if rows < a + b + c:
                raise UserError(
                    f"data.split={spec}: needs {a + b + c} rows, but the table has {rows}; use data.split=ratio "
                    "data.ratios=[...]"
                )
            return cls((a, a + b, a + b + c))
        parts = [float(part) for part in spec]
        if len(parts) != 3 or min(parts) < 0 or parts[0] <= 0 or abs(sum(parts) - 1) > 1e-6:
            raise UserError(
                f"data.ratios={list(spec)}: must be three ratios (train, validation, test) that add up to 1"
            )
        train, test = int(rows * parts[0]), int(rows * parts[2])
        return cls((train, rows - test, rows))

    def rows(self, name: str, lookback: int, horizon: int) -> tuple[int, int]:
        """Return the rows [start, stop) of "train", "val" or "test", with the lookback rows before its first target.

        Raises:
            UserError: if no window fits.
        """
        a, b, c = self.borders
        begin, stop = {"train": (0, a), "val": (a, b), "test": (b, c)}[name]
        start = begin if name == "train" else begin - lookback
        if start < 0 or stop - start < lookback + horizon:
            raise UserError(
                f"the {name} split has {stop - begin} of {c} rows (after {begin}): too short for one window of "
                f"lookback {lookback} + horizon {horizon}; use a shorter model.lookback or model.horizon, another "
                "data.split or more rows"
            )
        return start, stop


#: Relative rounding error of stored values, by type. A column that varies by less than this is constant.
NOISE = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12}
#: Number of rows that are standardised at a time; each needs temporary float64 memory.
_ROWS = 4096


@dataclass(frozen=True)
class Scaler:
    """Standardisation of each column. Constant columns have standard deviation 1.

    It is computed in float64, since float32 loses the small changes of a value with a large mean.
    """

    mean: NDArray[np.float64]  # (M,)
    std: NDArray[np.float64]  # (M,)

    @classmethod
    def fit(cls, values: NDArray[np.floating]) -> Scaler:
        """Fit mean and population standard deviation to the training rows ``values`` (T, M), ignoring NaN."""
        deviation: Any = np.std
        average: Any = np.mean
        if np.isnan(values).any():
            deviation, average = np.nanstd, np.nanmean
            values = np.where(np.isnan(values).all(axis=0), 0, values)  # a column of only NaN gets mean 0, deviation 1
        std = deviation(values, axis=0, dtype=np.float64)
        # The deviation of a constant column is rounding noise of its mean, not exactly 0.
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        constant = high - low <= NOISE[np.dtype(np.float64)] * np.maximum(np.abs(low), np.abs(high))
        std[constant | (std.astype(np.float32) == 0)] = 1.0
        return cls(average(values, axis=0, dtype=np.float64), std)

    def transform(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """Standardise ``values`` (..., M); returns float32."""
        rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
        made = np.empty(rows.shape, dtype=np.float32)
        for begin in range(0, len(rows), _ROWS):
            made[begin : begin + _ROWS] = (rows[begin : begin + _ROWS] - self.mean) / self.std
        return made.reshape(values.shape)

    def inverse(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert standardised ``values`` (..., M) to the units of the data."""
        return values * self.std + self.mean

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any], where: str | Path = "assets.json") -> Scaler:
        """Build the scaler from the result of :meth:`to_dict`.

        Args:
            where: the file, for messages.

        Raises:
            UserError: if ``saved`` is damaged.
        """
        try:
            mean, std = (np.asarray(saved[name], dtype=np.float64) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the scaler is damaged ({error!r}); restore the file") from None
        check_scaler(mean, std, f"{where}: the scaler is damaged", "restore the file, or train or export again")
        return cls(mean, std)


def check_scaler(mean: NDArray[np.floating], std: NDArray[np.floating], fault: str, cure: str) -> None:
    """Raise UserError unless all means are finite and all deviations are finite and above 0.

    Args:
        fault, cure: first and last part of the message.
    """
    if mean.shape != std.shape:
        raise UserError(f"{fault}: the means have shape {mean.shape}, the deviations {std.shape}; {cure}")
    for name, wrong in (("mean", ~np.isfinite(mean)), ("deviation", ~(np.isfinite(std) & (std > 0)))):
        if wrong.any():
            index = tuple(int(number) for number in np.argwhere(wrong)[0])
            value = (mean if name == "mean" else std)[index]
            raise UserError(f"{fault}: the {name} at index {', '.join(map(str, index))} is {value}; {cure}")


@dataclass(frozen=True)
class SplitRule:
    """A rule that divides the rows of tables and panels into train, validation and test."""

    kind: str  # etth, ettm, ratio, date or last
    parts: tuple[float, ...] = ()  # ratio: shares of train, validation and test
    dates: tuple[str, ...] = ()  # date: first date of validation, first date of test
    last: tuple[int, ...] = ()  # last: number of validation and of test time steps, at the end of each series

    @classmethod
    def of(cls, data: SeriesDataConfig) -> SplitRule:
        """Build the rule from the keys ``split``, ``ratios``, ``dates`` and ``last`` of the section ``data``."""
        return cls.make(data.split, data.ratios, data.dates, data.last)

    @classmethod
    def make(cls, kind: str, parts: Any = None, dates: Any = None, last: Any = None) -> SplitRule:
        """Build a rule. Arguments that ``kind`` does not use are dropped, so that equal splits compare equal."""
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
        """Split a table of ``rows`` rows.

        Args:
            stamps: (T,) times of the rows; None for a table without times.
            file: the table, for messages.
            zone: time zone of the dates; ``stamps`` are in UTC then.

        Raises:
            UserError: if no training rows remain, or if the rule has dates and the table has no sorted times.
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
                raise UserError(
                    f"{file}: data.split=date needs a time column; set data.time_column, or use data.split=ratio"
                )
            if (np.diff(stamps.astype(np.int64)) < 0).any():
                raise UserError(f"{file}: data.split=date needs rows sorted by time; sort the table")
            a, b = (int(np.searchsorted(stamps, date)) for date in self._dates(zone))
            borders = (a, b, rows)
        if borders[0] < 1:
            raise UserError(f"{file}: {self} leaves none of the {rows} rows for training; choose another split")
        return Split(borders)

    def cut_panel(self, lengths: Int64s, first: Int64s, timeline: Timeline | None, zone: str | None = None) -> Int64s:
        """Split each series of a panel: rows [0, a) are train, [a, b) validation, [b, c) test. Returns a, b, c (S, 3).

        Args:
            lengths: (S,) number of rows of each series.
            first: (S,) first position of each series on ``timeline``.
            zone: time zone of the dates; the times of ``timeline`` are in UTC then.

        Raises:
            UserError: if the rule has dates and the panel has no times, or if the rule is for tables only.
        """
        if self.kind == "ratio":
            Split.of(self.parts, 1000)  # raises for invalid ratios
            train, _, test = ((lengths * part).astype(np.int64) for part in self.parts)
            return np.stack([train, lengths - test, lengths], axis=1)
        if self.kind == "last":
            val, held_out = self._last()
            after = np.maximum(lengths - held_out, 0)
            return np.stack([np.maximum(after - val, 0), after, lengths], axis=1)
        if self.kind != "date":
            raise UserError(f"data.split={self.kind}: not possible for a panel; use ratio, date or last")
        if timeline is None:
            raise UserError(
                "data.split=date needs times, but the panel was prepared without them; use data.split=ratio or last"
            )
        a, b = (np.clip(_position_from(timeline, date) - first, 0, lengths) for date in self._dates(zone))
        return np.stack([a, b, lengths], axis=1)

    def _last(self) -> tuple[int, int]:
        """Return the numbers of validation and test time steps."""
        if len(self.last) != 2 or min(self.last) < 0:
            raise UserError(
                f"data.last={list(self.last)}: must be the numbers of validation and test time steps, such as [28, 28]"
            )
        return self.last[0], self.last[1]

    def _dates(self, zone: str | None) -> tuple[np.datetime64, np.datetime64]:
        """Return the two dates, converted to UTC if a time zone is given."""
        try:
            made = [np.datetime64(date.strip().replace(" ", "T"), "us") for date in self.dates]
        except ValueError:
            made = []
        if len(made) != 2 or not made[0] <= made[1]:
            raise UserError(
                f"data.dates={list(self.dates)}: must be the first date of validation and the first date of test, such "
                "as [2017-07-01, 2017-10-01]"
            )
        if zone is not None:
            made = list(to_utc(np.array(made), zone))
        return made[0], made[1]

    def __str__(self) -> str:
        value = {"ratio": self.parts, "date": self.dates, "last": self.last}.get(self.kind)
        key = {"ratio": "ratios", "date": "dates", "last": "last"}.get(self.kind)
        return f"data.split={self.kind}" + (f" data.{key}={list(value)}" if value is not None else "")


def guess_split(name: str) -> SplitRule:
    """Return the split that the benchmarks use for a table of this name: etth, ettm, or else 70/10/20 %."""
    found = re.match(r"ett([hm])\d", name.lower())
    return SplitRule(f"ett{found[1]}") if found else SplitRule("ratio", parts=RATIOS)


def _position_from(timeline: Timeline, date: np.datetime64) -> int:
    """Return the first position of the timeline at ``date`` or later."""
    position = int(timeline.positions(np.array([date]))[0][0])
    return position if timeline.stamps(position, 1)[0] >= date else position + 1
