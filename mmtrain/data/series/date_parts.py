"""Parse texts of dates whose order of day, month and year is given."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

_MARK = r"\s?[-/. ]\s?"
_WORD = r"(?P<word>[A-Za-z]{3,9})\.?"
_WEEKDAY = r"(?:[A-Za-z]{3,9},?\s+)?"
#: Patterns of the supported ways to write a date, by name of the family.
FAMILIES = {
    "numbers": rf"(?P<a>\d{{1,4}}){_MARK}(?P<b>\d{{1,2}}){_MARK}(?P<c>\d{{1,4}})\.?",
    "day of month": rf"{_WEEKDAY}(?P<a>\d{{1,2}})[-/.\s]*{_WORD}[-/.,\s]*(?P<c>\d{{4}}|\d{{2}})",
    "month, day": rf"{_WEEKDAY}{_WORD}\s+(?P<a>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<c>\d{{4}})",
    "month and year": rf"{_WORD}(?:[-/.,\s]*(?P<c>\d{{4}})|[-/'](?P<short>\d{{2}}))",
    "year and month": rf"(?P<c>\d{{4}})[-/.\s]*{_WORD}",
    "quarter": r"(?P<c>\d{4})[-/\s]*[Qq](?P<quarter>[1-4])",
    "month/year": r"(?P<b>\d{1,2})[-/.](?P<c>\d{4})",
}
#: Possible orders of day, month and year, by family. A family that is not listed has only one order.
ORDERS = {"numbers": ("dmy", "mdy", "ymd")}
#: Pattern of the optional text after a date: time of day, AM or PM, UTC offset.
TAIL = (
    r"(?:(?:T|,\s*|\s+)(?P<clock>\d{1,2}:[0-5]\d(?::[0-5]\d(?:[.,]\d+)?)?)\s*(?:(?P<half>[AaPp])\.?[Mm]\.?)?"
    r"\s*(?P<zone>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?)?"
)
_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_NAMES = {name[:3]: number for number, name in enumerate(_MONTHS, 1)}
_NAMES |= {name: number for number, name in enumerate(_MONTHS, 1)} | {"sept": 9}
#: Two-digit years below this value belong to the 2000s, the others to the 1900s, as in strptime.
_PIVOT = 69

Days = NDArray[np.datetime64]


@dataclass(frozen=True)
class DateTexts:
    """Texts (T,) of dates written in one way, split into date and time of day. Distinct parts are parsed only once."""

    family: str  # the way in which they are written, a key of :data:`FAMILIES`
    dates: pd.DataFrame  # the groups of the pattern, one row for each distinct date
    clocks: NDArray[np.timedelta64]  # the distinct times of day, less their UTC offset
    date_of: NDArray[np.int64]  # (T,) row in ``dates``
    clock_of: NDArray[np.int64]  # (T,) index into ``clocks``

    @classmethod
    def of(cls, texts: Iterable[str], family: str) -> DateTexts:
        """Split ``texts`` that are written in the way of ``family``, a key of :data:`FAMILIES`."""
        import pandas as pd

        cut = [_cut(text) for text in texts]
        date_of, dates = pd.factorize(np.array([date for date, _ in cut], dtype=object))
        clock_of, tails = pd.factorize(np.array([tail for _, tail in cut], dtype=object))
        groups = pd.Series(dates, dtype="string").str.extract(f"^{FAMILIES[family]}$", flags=re.ASCII)
        behind = pd.Series(tails, dtype="string").str.extract(f"^{TAIL}$", flags=re.ASCII)
        return cls(family, groups, _clocks(behind), date_of, clock_of)

    def times(self, order: str) -> NDArray[np.datetime64]:
        """Return times (T,) as datetime64[us], reading the numbers in ``order`` ("dmy", ...); NaT for invalid texts."""
        days = _assemble(self.dates, self.family, order).astype("datetime64[us]")
        return np.asarray(days[self.date_of] + self.clocks[self.clock_of])


def _cut(text: str) -> tuple[str, str]:
    """Split a text into the date and the time of day after it."""
    colon = text.find(":")
    if colon < 0:
        return text, ""
    begin = max(text.rfind(" ", 0, colon), text.rfind("T", 0, colon), 0)
    return text[:begin].rstrip(" ,"), text[begin:]


def _assemble(parts: pd.DataFrame, family: str, order: str) -> Days:
    """Return the days (datetime64[D]) of the pattern groups ``parts``; NaT for invalid dates."""
    if family == "numbers":
        group = {letter: "abc"[number] for number, letter in enumerate(order)}
        year, month, day = (_number(parts[group[letter]]) for letter in "ymd")
        digits, *others = (_number(parts[group[letter]].str.len()) for letter in "ydm")
        fits = ((digits == 4) | (digits == 2)) & (np.maximum(*others) <= 2)
        return _days(np.where(fits, _century(year, digits), np.nan), month, day)
    year_text = parts["c"] if "short" not in parts else parts["c"].fillna(parts["short"])
    year = _century(_number(year_text), _number(year_text.str.len()))
    if "word" in parts:
        month = _number(parts["word"].str.lower().map(_NAMES))
    elif "quarter" in parts:
        month = _number(parts["quarter"]) * 3 - 2
    else:
        month = _number(parts["b"])
    return _days(year, month, _number(parts["a"]) if "a" in parts else np.ones(len(parts)))


def _clocks(parts: pd.DataFrame) -> NDArray[np.timedelta64]:
    """Return the time since midnight less the UTC offset (T,), in microseconds; NaT for an invalid time of day."""
    import pandas as pd

    clock = parts["clock"].str.replace(",", ".", regex=False).fillna("0:00")
    clock = clock.where(clock.str.count(":") == 2, clock + ":00")
    passed = pd.to_timedelta(clock.astype(object), errors="coerce").to_numpy().astype("timedelta64[us]")
    hour, half = np.timedelta64(3_600_000_000, "us"), parts["half"].str.lower()
    morning, evening = ((half == letter).to_numpy(dtype=bool, na_value=False) for letter in "ap")
    fits = np.where(morning | evening, (passed >= hour) & (passed < 13 * hour), passed <= 24 * hour)
    passed = passed - np.where((morning | evening) & (passed >= 12 * hour), 12 * hour, 0 * hour)
    passed = passed + np.where(evening, 12 * hour, 0 * hour)
    offset = parts["zone"].str.extract(r"^([+-])(\d\d):?(\d\d)?$")
    minutes = np.nan_to_num(_number(offset[1]) * 60 + np.nan_to_num(_number(offset[2])))
    minutes = np.where((offset[0] == "-").to_numpy(dtype=bool, na_value=False), -minutes, minutes)
    passed = passed - (minutes * 60_000_000).astype("timedelta64[us]")
    return np.where(fits, passed, np.timedelta64("NaT", "us"))


def _number(texts: pd.Series[Any]) -> NDArray[np.float64]:
    return np.asarray(texts.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan))


def _century(year: NDArray[np.float64], digits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the century to years that are written with two digits."""
    return np.where(digits == 2, np.where(year < _PIVOT, 2000.0, 1900.0) + year, year)


def _days(year: NDArray[np.float64], month: NDArray[np.float64], day: NDArray[np.float64]) -> Days:
    """Return the days (datetime64[D]) of the calendar; NaT for a date that does not exist."""
    good = (year >= 1) & (month >= 1) & (month <= 12) & (day >= 1)
    number = np.where(good, (year - 1970) * 12 + month - 1, 0).astype(np.int64)
    months = number.astype("datetime64[M]")
    days = months.astype("datetime64[D]") + np.where(good, day - 1, 0).astype("timedelta64[D]")
    good &= days.astype("datetime64[M]") == months
    return np.where(good, days, np.datetime64("NaT", "D"))
