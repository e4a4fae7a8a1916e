"""The time axis: steps of fixed length or of whole months, the grid on which series lie, and calendar features.

Calendar features follow from the date alone, so they are known for any future. They are numbers in [-0.5, 0.5], as in
Informer.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError

Stamps = NDArray[np.datetime64]
Int64s = NDArray[np.int64]

_SECOND = 1_000_000
UNITS = {"s": _SECOND, "min": 60 * _SECOND, "h": 3600 * _SECOND, "D": 86400 * _SECOND, "W": 7 * 86400 * _SECOND}
_MONTHS = {"M": 1, "Q": 3, "Y": 12}


@dataclass(frozen=True)
class Step:
    """``count`` microseconds, or ``count`` months: a month has no fixed length."""

    count: int
    months: bool = False

    @classmethod
    def parse(cls, text: str) -> Step:
        """From "15min", "h", "1D", "W", "M" (month), "Q" or "Y".

        Raises:
            UserError: for what is none of these.
        """
        found = re.fullmatch(r"(\d*)\s*([A-Za-z]+)", text.strip())
        number, unit = (int(found[1] or 1), found[2]) if found else (0, "")
        if number < 1 or unit not in {**UNITS, **_MONTHS}:
            known = ", ".join((*UNITS, *_MONTHS))
            raise UserError(f"step {text!r}: a number and one of {known}, such as 15min or 1D")
        return cls(number * _MONTHS[unit], months=True) if unit in _MONTHS else cls(number * UNITS[unit])

    def __str__(self) -> str:
        if self.months:
            return f"{self.count}M"
        for unit, size in reversed(UNITS.items()):
            if self.count % size == 0:
                return f"{self.count // size}{unit}"
        return f"{self.count / _SECOND:g}s"


@dataclass(frozen=True)
class Timeline:
    """Place p of the grid is the time ``origin`` + p·``step``; with steps of months only the month counts."""

    origin: np.datetime64
    step: Step

    def places(self, stamps: Stamps) -> tuple[Int64s, NDArray[np.bool_]]:
        """Place of each stamp (int64), and which of them lie on the grid (the others' places are meaningless)."""
        if self.step.months:
            months = (stamps.astype("datetime64[M]") - self.origin.astype("datetime64[M]")).astype(np.int64)
            return months // self.step.count, months % self.step.count == 0
        passed = (stamps.astype("datetime64[us]") - self.origin.astype("datetime64[us]")).astype(np.int64)
        return passed // self.step.count, passed % self.step.count == 0

    def stamps(self, first: int, count: int) -> Stamps:
        """Times of ``count`` places from ``first`` on, datetime64[us]; with steps of months the month's first day."""
        places = np.arange(first, first + count, dtype=np.int64)
        if self.step.months:
            months = self.origin.astype("datetime64[M]") + (places * self.step.count).astype("timedelta64[M]")
            return months.astype("datetime64[us]")
        return self.origin.astype("datetime64[us]") + (places * self.step.count).astype("timedelta64[us]")


class Steps:
    """Finds the step of series whose rows stream by, in any order of series.

    ``backward`` counts rows before an earlier one of their series. Where there are none, the step is the commonest one
    between neighbours; else the widest that takes in every time.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.backward = 0
        self._from: int | None = None  # any one of the times
        self._divisor = self._months = 0
        self._same_day = True

    def add(self, microseconds: Int64s) -> None:
        """Steps (int64 µs) between stamps of one series; 0 is a repeated stamp, below 0 one out of order."""
        known, counts = np.unique(microseconds, return_counts=True)
        for step, count in zip(known.tolist(), counts.tolist(), strict=True):
            self.counts[step] += count
        self.backward += int((microseconds < 0).sum())

    def see(self, stamps: Int64s) -> None:
        """Times (int64 µs) of any series."""
        if not len(stamps):
            return
        times = stamps.astype("datetime64[us]")
        months = times.astype("datetime64[M]")
        if self._from is None:
            self._from = int(stamps[0])
        origin = np.datetime64(self._from, "us")
        start = origin.astype("datetime64[M]")
        self._divisor = int(np.gcd.reduce(np.append(stamps - self._from, self._divisor)))
        self._months = int(np.gcd.reduce(np.append((months - start).astype(np.int64), self._months)))
        self._same_day &= bool((times - months == origin - start).all())

    def usual(self) -> Step | None:
        """The step; months where the steps are as long as months are. None without any."""
        if self.backward:
            if self._same_day and self._months:
                return Step(self._months, months=True)
            return Step(self._divisor) if self._divisor else None
        forward = {step: count for step, count in self.counts.items() if step > 0}
        if not forward:
            return None
        usual = max(forward, key=lambda step: (forward[step], -step))
        for months in (1, 3, 6, 12):
            alike = sum(count for step, count in forward.items() if _spans(step, months))
            lengths = {step for step in forward if _spans(step, months)}
            if _spans(usual, months) and len(lengths) > 1 and 2 * alike > sum(forward.values()):
                return Step(months, months=True)
        return Step(usual)


def _spans(step: int, months: int) -> bool:
    """Whether ``months`` months can be ``step`` µs long."""
    days = {1: (28, 31), 3: (90, 92), 6: (181, 184), 12: (365, 366)}[months]
    return days[0] * UNITS["D"] <= step <= days[1] * UNITS["D"]


def step_of(stamps: Stamps) -> Step | None:
    """The usual step of one series; None for fewer than two stamps, or none that rise."""
    found = Steps()
    if len(stamps) > 1:
        us: Int64s = stamps.astype("datetime64[us]").astype(np.int64)
        found.add(us[1:] - us[:-1])
    return found.usual()


#: Each feature with the span (µs) after which it comes round; a step of whole spans never changes it.
_PERIODS = {"second": UNITS["min"], "minute": UNITS["h"], "hour": UNITS["D"], "weekday": UNITS["W"]}
FEATURES = (*_PERIODS, "day", "yearday", "month")


def calendar_names(step: Step) -> list[str]:
    """The features that vary over steps of ``step``: hour, weekday, day, yearday and month for hourly data."""
    if step.months:
        return ["month"] if step.count % 12 else []
    return [name for name in FEATURES if name not in _PERIODS or step.count % _PERIODS[name]]


def calendar_features(stamps: Stamps, names: list[str]) -> NDArray[np.float32]:
    """(T,) times → (T, len(names)) float32: the first value of each feature is -0.5, the last 0.5."""
    us = stamps.astype("datetime64[us]")
    days, months, years = (us.astype(f"datetime64[{unit}]") for unit in "DMY")
    seconds = (us - days).astype(np.int64) // UNITS["s"]
    scaled = {
        "second": lambda: seconds % 60 / 59,
        "minute": lambda: seconds // 60 % 60 / 59,
        "hour": lambda: seconds // 3600 / 23,
        # 1970-01-01 was a Thursday; Monday is 0
        "weekday": lambda: (days.astype(np.int64) + 3) % 7 / 6,
        "day": lambda: (days - months).astype(np.int64) / 30,
        "yearday": lambda: (days - years).astype(np.int64) / 365,
        "month": lambda: months.astype(np.int64) % 12 / 11,
    }
    made = np.empty((len(stamps), len(names)), dtype=np.float32)
    for place, name in enumerate(names):
        made[:, place] = scaled[name]() - 0.5
    return made
