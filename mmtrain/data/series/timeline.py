"""Time steps, the regular grid of times that series share, and the times that follow a series.

A time step has a fixed length, or is a number of months or of business days. With a time zone, times are in UTC, and
time steps of days or longer are counted in the local calendar of the zone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.times import frequency
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Stamps = NDArray[np.datetime64]
Int64s = NDArray[np.int64]

_SECOND = 1_000_000
UNITS = {"s": _SECOND, "min": 60 * _SECOND, "h": 3600 * _SECOND, "D": 86400 * _SECOND, "W": 7 * 86400 * _SECOND}
_MONTHS = {"M": 1, "Q": 3, "Y": 12}
_BUSINESS = "B"
#: Days of a month by the names of pandas: first day, last day, first business day, last business day.
_ANCHORS = ("MS", "ME", "BMS", "BME")
#: Number of the last times of a table from which its next times are inferred.
_LAST = 1000


@dataclass(frozen=True)
class Step:
    """A time step of a fixed length, or of a number of months or of business days (Monday to Friday)."""

    count: int  # microseconds, months or business days
    months: bool = False  # count months
    business: bool = False  # count business days

    @classmethod
    def parse(cls, text: str) -> Step:
        """Parse a number and a unit, such as "15min", "h", "1D", "B" (business day), "W", "M" (month), "Q" or "Y".

        Raises:
            UserError: for any other text.
        """
        found = re.fullmatch(r"(\d*)\s*([A-Za-z]+)", text.strip())
        number, unit = (int(found[1] or 1), found[2]) if found else (0, "")
        if number < 1 or unit not in {**UNITS, **_MONTHS, _BUSINESS: 1}:
            known = ", ".join((*UNITS, _BUSINESS, *_MONTHS))
            raise UserError(f"--step {text}: must be a number and a unit ({known}), such as 15min or 1D")
        if unit == _BUSINESS:
            return cls(number, business=True)
        return cls(number * _MONTHS[unit], months=True) if unit in _MONTHS else cls(number * UNITS[unit])

    def __str__(self) -> str:
        if self.months or self.business:
            return f"{self.count}{'M' if self.months else _BUSINESS}"
        for unit, size in reversed(UNITS.items()):
            if self.count % size == 0:
                return f"{self.count // size}{unit}"
        return f"{self.count / _SECOND:g}s"

    @property
    def whole_days(self) -> bool:
        """Whether the step is a number of calendar days, which can have 23 or 25 hours in a time zone."""
        return self.months or self.business or self.count % UNITS["D"] == 0


@dataclass(frozen=True)
class Timeline:
    """A regular grid of times: position p is the time ``origin`` + p·``step``.

    Attributes:
        anchor: day of the month for steps of months: a name of pandas (MS, ME, BMS, BME), or a number (the last day in
            shorter months). The time of day is that of ``origin``. None: the first day at midnight, as in panels of
            version 0.1.0.
        zone: time zone. The times are in UTC then, but ``origin`` and the steps are in local time.
    """

    origin: np.datetime64
    step: Step
    anchor: str | None = None
    zone: str | None = None

    @property
    def local(self) -> Timeline:
        """The same grid with local times."""
        return replace(self, zone=None)

    def to_json(self) -> dict[str, Any]:
        step = {"count": self.step.count, "months": self.step.months, "business": self.step.business}
        zone = {} if self.zone is None else {"zone": self.zone}
        return {"origin": str(self.origin), **step, "anchor": self.anchor, **zone}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Timeline:
        """Build the grid from the result of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: if ``saved`` is damaged.
        """
        step = Step(int(saved["count"]), bool(saved["months"]), bool(saved.get("business")))
        anchor = saved.get("anchor")
        if step.count < 1 or (anchor not in (None, *_ANCHORS) and not 1 <= int(anchor) <= 31):
            raise ValueError(f"invalid step {step.count} or anchor {anchor!r}")
        made = cls(np.datetime64(saved["origin"], "us"), step, anchor, saved.get("zone"))
        made.stamps(0, 1)
        return made

    def positions(self, stamps: Stamps) -> tuple[Int64s, NDArray[np.bool_]]:
        """Return the position (int64) of each time, and whether the time is on the grid.

        The position of a time that is not on the grid has no meaning. With steps of months only the month is compared.
        """
        if self.zone is not None:
            return self.local.positions(to_local(stamps, self.zone))
        if self.step.months:
            passed = (stamps.astype("datetime64[M]") - self.origin.astype("datetime64[M]")).astype(np.int64)
        elif self.step.business:
            days = stamps.astype("datetime64[D]")
            passed = np.busday_count(self.origin.astype("datetime64[D]"), days).astype(np.int64)
            valid = np.is_busday(days) & (_clock(stamps) == _clock(self.origin))
            return passed // self.step.count, valid & (passed % self.step.count == 0)
        else:
            passed = (stamps.astype("datetime64[us]") - self.origin.astype("datetime64[us]")).astype(np.int64)
        return passed // self.step.count, passed % self.step.count == 0

    def stamps(self, first: int, count: int) -> Stamps:
        """Return the times (datetime64[us]) of ``count`` positions from ``first`` on."""
        if self.zone is not None:
            return to_utc(self.local.stamps(first, count), self.zone)
        passed = np.arange(first, first + count, dtype=np.int64) * self.step.count
        if self.step.months:
            months = self.origin.astype("datetime64[M]") + passed.astype("timedelta64[M]")
            days = _in_months(months, self.anchor or "MS").astype("datetime64[us]")
            return days if self.anchor is None else days + _clock(self.origin)
        if self.step.business:
            found = np.busday_offset(self.origin.astype("datetime64[D]"), passed, roll="forward")
            return found.astype("datetime64[us]") + _clock(self.origin)
        return self.origin.astype("datetime64[us]") + passed.astype("timedelta64[us]")


def to_local(stamps: Stamps, zone: str) -> Stamps:
    """Convert UTC times to local times of ``zone``."""
    import pandas as pd

    made = pd.DatetimeIndex(stamps).tz_localize("UTC").tz_convert(zone).tz_localize(None)
    return made.to_numpy().astype("datetime64[us]")


def to_utc(stamps: Stamps, zone: str) -> Stamps:
    """Convert local times of ``zone`` to UTC.

    A local time that occurs twice (end of summer time) is read as its first occurrence. A local time that does not
    exist (start of summer time) becomes the next existing one.
    """
    import pandas as pd

    first = np.ones(len(stamps), dtype=bool)
    made = pd.DatetimeIndex(stamps).tz_localize(zone, ambiguous=first, nonexistent="shift_forward")
    return made.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")


def _clock(stamps: Stamps | np.datetime64) -> Any:
    """Return the time since midnight, in microseconds."""
    return stamps.astype("datetime64[us]") - stamps.astype("datetime64[D]")


def _in_months(months: Stamps, anchor: str) -> Stamps:
    """Return the day (datetime64[D]) that ``anchor`` names in each of ``months`` (datetime64[M])."""
    first, following = months.astype("datetime64[D]"), (months + 1).astype("datetime64[D]")
    if anchor == "MS":
        return first
    if anchor == "ME":
        return following - 1
    if anchor == "BMS":
        return np.busday_offset(first, 0, roll="forward")
    if anchor == "BME":
        return np.busday_offset(following, -1, roll="forward")
    return np.minimum(first + (int(anchor) - 1), following - 1)


class _Days:
    """Finds what many times have in common: the day of the month, no weekends, the time of day."""

    def __init__(self) -> None:
        self._anchors = set(_ANCHORS)  # names that fit all times so far
        self._exact: set[int] = set()  # up to two days of the month, the last day of a month excluded
        self._latest = 0  # highest day of the month
        self._clocks: set[int] = set()  # up to two different times of day
        self._weekend = False
        self._low = self._high = 0

    def see(self, times: Stamps) -> None:
        """Add times."""
        days, months = times.astype("datetime64[D]"), times.astype("datetime64[M]")
        numbers = days.astype(np.int64)
        self._low = min(self._low, int(numbers.min())) if self._clocks else int(numbers.min())
        self._high = max(self._high, int(numbers.max())) if self._clocks else int(numbers.max())
        if len(self._clocks) < 2:
            self._clocks |= set(np.unique((times - days).astype(np.int64))[:2].tolist())
        self._weekend = self._weekend or not bool(np.is_busday(days).all())
        self._anchors = {name for name in self._anchors if bool((_in_months(months, name) == days).all())}
        if len(self._exact) < 2:
            of_month = (days - months.astype("datetime64[D]")).astype(np.int64) + 1
            early = days != _in_months(months, "ME")
            self._exact |= set(np.unique(of_month[early])[:2].tolist())
            self._latest = max(self._latest, int(of_month.max()))

    def anchor(self) -> str | None:
        """Return the day of the month that all times share, or None if it or the time of day varies."""
        if len(self._clocks) != 1:
            return None
        named = next((name for name in _ANCHORS if name in self._anchors), None)
        if named is None and len(self._exact) == 1 and self._exact == {self._latest}:
            return str(self._latest)
        return named

    def business(self) -> bool:
        """Return whether the times cover more than a week without weekend days, all at the same time of day."""
        return len(self._clocks) == 1 and not self._weekend and self._high - self._low >= 7


class Steps:
    """Infers the time step of many series from a stream of their rows, in any order of series.

    ``backward`` counts rows with an earlier time than the row before them in their series. If it is 0, the step is the
    most common one between adjacent rows. Otherwise it is the longest step whose grid contains every time.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.backward = 0
        self._from: int | None = None  # the first time that was added
        self._divisor = self._months = 0
        self._same_day = True
        self._days = _Days()

    def add(self, microseconds: Int64s) -> None:
        """Add differences (int64 µs) between adjacent times of a series; they may be 0 or negative."""
        known, counts = np.unique(microseconds, return_counts=True)
        for step, count in zip(known.tolist(), counts.tolist(), strict=True):
            self.counts[step] += count
        self.backward += int((microseconds < 0).sum())

    def see(self, stamps: Int64s) -> None:
        """Add times (int64 µs) of any series."""
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
        self._days.see(times)

    def usual(self) -> Step | None:
        """Return the usual step, recognising months and business days; None if no step was seen."""
        anchor = self._days.anchor()
        if self.backward:
            if self._months and (self._same_day or anchor is not None):
                return Step(self._months, months=True)
            return self._daily(self._divisor) if self._divisor else None
        forward = {step: count for step, count in self.counts.items() if step > 0}
        if not forward:
            return None
        usual = max(forward, key=lambda step: (forward[step], -step))
        slack = 3 if anchor in ("BMS", "BME") else 0  # weekends shift the first and last business day of a month
        for months in (1, 3, 6, 12):
            alike = sum(count for step, count in forward.items() if _spans(step, months, slack))
            lengths = {step for step in forward if _spans(step, months, slack)}
            if _spans(usual, months, slack) and len(lengths) > 1 and 2 * alike > sum(forward.values()):
                return Step(months, months=True)
        return self._daily(usual)

    def _daily(self, microseconds: int) -> Step:
        """Return a step of fixed length, or of one business day if it is a day and the times fit."""
        if microseconds == UNITS["D"] and self._days.business():
            return Step(1, business=True)
        return Step(microseconds)

    def timeline(self, origin: np.datetime64, step: Step | None = None) -> Timeline | None:
        """Return the grid from ``origin`` on, with ``step`` or else the usual step; None if there is no step."""
        step = step or self.usual()
        if step is None:
            return None
        return Timeline(origin, step, self._days.anchor() if step.months else None)


def _spans(step: int, months: int, slack: int) -> bool:
    """Return whether ``months`` months can last ``step`` µs, with a tolerance of ``slack`` days."""
    days = {1: (28, 31), 3: (90, 92), 6: (181, 184), 12: (365, 366)}[months]
    return (days[0] - slack) * UNITS["D"] <= step <= (days[1] + slack) * UNITS["D"]


def step_of(stamps: Stamps) -> Step | None:
    """Return the usual time step of one series; None if no time is later than the one before it."""
    return _steps(stamps).usual()


def timeline_of(stamps: Stamps, step: Step | None = None) -> Timeline | None:
    """Return the grid of one series from its first time on, with ``step`` or its usual step; None without a step."""
    return _steps(stamps).timeline(stamps[0], step) if len(stamps) else None


def _steps(stamps: Stamps) -> Steps:
    """Collect the time steps of one series."""
    found = Steps()
    us: Int64s = stamps.astype("datetime64[us]").astype(np.int64)
    if len(us) > 1:
        found.add(us[1:] - us[:-1])
    found.see(us)
    return found


def continued(stamps: Stamps, rows: int, zone: str | None = None) -> Stamps | None:
    """Extend ``stamps`` by the times that follow, to ``rows`` times in total; None if they have no time step.

    The next times follow the frequency that pandas infers from the last times: month starts and ends, quarters, years,
    weeks, business days, hours and so on. If the times are irregular, months and business days are still recognised;
    otherwise the most common step is repeated.

    Args:
        zone: time zone in which steps of days or longer are counted; ``stamps`` are in UTC then.
    """
    if rows <= len(stamps):
        return stamps
    more = _following(stamps[-_LAST:], rows - len(stamps), zone)
    return None if more is None else np.concatenate([stamps, more.astype(stamps.dtype)])


def _following(stamps: Stamps, count: int, zone: str | None) -> Stamps | None:
    """Return the ``count`` times after ``stamps``; None if they have no time step."""
    import pandas as pd

    if len(stamps) < 2:
        return None
    found = _next(pd.DatetimeIndex(stamps), count)
    if zone is None or found is None or not found[1]:
        return None if found is None else found[0].to_numpy()
    found = _next(pd.DatetimeIndex(to_local(stamps, zone)), count)
    return None if found is None else to_utc(found[0].to_numpy(), zone)


def _next(index: pd.DatetimeIndex, count: int) -> tuple[pd.DatetimeIndex, bool] | None:
    """Return the next ``count`` times, and whether the step is a day or longer; None without a step."""
    import pandas as pd

    offset = frequency(index)
    if offset is not None:
        short = isinstance(offset, pd.offsets.Tick) and pd.Timedelta(offset) < pd.Timedelta(days=1)
        return pd.date_range(index[-1], periods=count + 1, freq=offset)[1:], not short
    stamps = index.to_numpy().astype("datetime64[us]")
    line = timeline_of(stamps)
    if line is None:
        return None
    day = str(int((stamps[-1].astype("datetime64[D]") - stamps[-1].astype("datetime64[M]")).astype(np.int64)) + 1)
    following = Timeline(stamps[-1], line.step, line.anchor or day).stamps(1, count)
    return pd.DatetimeIndex(following), line.step.whole_days
