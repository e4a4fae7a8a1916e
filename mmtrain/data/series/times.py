"""Parse columns of times. One format is chosen for the whole column, never row by row."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.date_parts import FAMILIES, ORDERS, TAIL, DateTexts
from mmtrain.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Stamps = NDArray[np.datetime64]
Int64s = NDArray[np.int64]

#: Units of numbers since 1970, as units per second. A number for a time from 1980 to 2100 fits only one of them.
EPOCHS = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
_EARLIEST, _LATEST = 315_532_800, 4_102_444_800
#: Format of dates that are written as whole numbers, such as 20220131, by number of digits.
_DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_YEARS = 1900, 2100
_ISO = re.compile(r"\d{4}[-/]\d{1,2}([-/]\d|$)|\d{8}T\d")
_ZONED = r"(?::\d\d|T\d{2,6})(?:[.,]\d+)?\s*(?:[AaPp]\.?[Mm]\.?)?\s*(?:Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)$"
_OFFSET = re.compile(r"([+-])(\d\d):?(\d\d)?$")
_SAMPLE = 50
#: Number of texts that are tried first; they usually leave only one possible order of day and month.
_FIRST = 2000


@dataclass(frozen=True)
class Reading:
    """How a column of times is read.

    Attributes:
        kind: "dates" (already times), "iso" (ISO 8601), "epoch" (numbers since 1970), "digits" (dates as numbers),
            "parts" (day, month and year), "words" (pandas guesses), or "format" (strptime codes).
        detail: unit for "epoch", order of day, month and year for "parts", strptime codes for "digits" and "format".
        family: key of :data:`~mmtrain.data.series.date_parts.FAMILIES`, for "parts".
        zone: time zone of the column, in which results are shown.
    """

    kind: str
    detail: str = ""
    family: str = ""
    zone: str | None = None

    def stamps(self, column: pd.Series) -> Stamps:
        """Return the times (T,) as datetime64[us], in UTC if there is a zone; NaT for values that are not times."""
        import pandas as pd

        if self.kind == "parts":
            # The code of a missing value is -1, which selects the empty text at the end.
            codes, unique = pd.factorize(_texts(column))
            times = DateTexts.of([*map(str, unique), ""], self.family).times(self.detail)
            return times[codes]
        options: dict[str, Any] = {
            "dates": {},
            "iso": {"format": "ISO8601"},
            "words": {"format": "mixed"},
            "format": {"format": self.detail},
            "digits": {"format": self.detail},
            "epoch": {"unit": self.detail},
        }[self.kind]
        given = column
        if self.kind in ("epoch", "digits"):
            given = pd.to_numeric(column, errors="coerce")
            if self.kind == "digits":
                given = given.astype("Int64").astype("string")
        elif self.kind == "format":
            given = _texts(column)
        made = pd.to_datetime(given, errors="coerce", utc=True, **options)
        return np.asarray(made.dt.tz_localize(None).to_numpy().astype("datetime64[us]"))


def find_reading(column: pd.Series, where: str, time_format: str | None = None) -> Reading | None:
    """Find out how to read a column of times. Some of its rows may still not be times.

    Args:
        where: the file and the column, for messages.
        time_format: the order of day, month and year (dmy, mdy, ymd), strptime codes, or a unit of ``EPOCHS``; None
            detects the format.

    Returns:
        The reading; None if the column contains numbers that are not times.

    Raises:
        UserError: if the dates are ambiguous, or if only some rows have a UTC offset.
    """
    import pandas as pd

    if time_format is not None:
        return _given(column, where, time_format)
    if pd.api.types.is_datetime64_any_dtype(column):
        zone = getattr(column.dt, "tz", None)
        return Reading("dates", zone=None if zone is None else str(zone))
    if pd.api.types.is_numeric_dtype(column):
        return None if pd.api.types.is_bool_dtype(column) else _numbers(column.dropna())
    if pd.api.types.infer_dtype(column, skipna=True) in ("date", "datetime", "datetime64"):
        return Reading("dates")
    texts = _texts(column)
    texts = texts[(texts != "").to_numpy(dtype=bool, na_value=False)]
    if not len(texts):
        return Reading("iso")
    first = str(texts.iloc[0])
    if re.fullmatch(r"\d+(\.\d+)?", first) and len(first.split(".")[0]) > 3:
        numbers = pd.to_numeric(texts, errors="coerce")
        return _numbers(numbers.dropna())
    return _zoned(_family(texts, where), texts, where)


def are_dates(column: pd.Series) -> bool:
    """Return whether a sample of a column contains only dates; numbers do not count as dates."""
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if pd.api.types.is_numeric_dtype(column):
        return False
    known = column.dropna()
    some = known.iloc[np.linspace(0, len(known) - 1, min(len(known), _SAMPLE)).astype(int)]
    if pd.api.types.infer_dtype(some) in ("date", "datetime"):
        return True
    texts = _texts(some)
    counts = _counts(list(texts))
    best = max(counts, key=lambda name: counts[name])
    if not len(texts) or counts[best] < len(texts):
        return False
    readings = [Reading("parts", order, best) for order in ORDERS.get(best, ("",))]
    return any(
        not np.isnat(reading.stamps(texts)).any() for reading in (readings if best != "iso" else [Reading("iso")])
    )


def frequency(index: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """Return the frequency that pandas infers: hours, month starts or ends, business days and so on.

    None if there are fewer than three times, or if they are irregular, repeated or not sorted.
    """
    import pandas as pd
    from pandas.tseries.frequencies import to_offset

    if len(index) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas warns that a later version changes the type of the result
        found = to_offset(pd.infer_freq(index))
    return found if found is not None and found.n >= 1 else None


def has_frequency(times: Stamps) -> bool:
    """Return whether :func:`frequency` finds a frequency of the sorted ``times``."""
    import pandas as pd

    return frequency(pd.DatetimeIndex(times)) is not None


def shown(stamps: Stamps, zone: str | None) -> pd.DatetimeIndex:
    """Convert UTC times to times of ``zone`` for output; without a zone they are unchanged."""
    import pandas as pd

    index = pd.DatetimeIndex(stamps)
    return index if zone is None else index.tz_localize("UTC").tz_convert(zone)


def _texts(column: pd.Series) -> pd.Series:
    """Return the values as text without surrounding blanks."""
    return column.astype("string").str.strip()


def _given(column: pd.Series, where: str, time_format: str) -> Reading:
    """Return the reading for a ``time_format`` that the user set; UserError if it is invalid."""
    import pandas as pd

    if time_format in EPOCHS:
        return Reading("epoch", time_format)
    if time_format in ORDERS["numbers"]:
        return _zoned(Reading("parts", time_format, "numbers"), _texts(column).dropna(), where)
    try:
        pd.to_datetime(pd.Series(["-"]), format=time_format, errors="coerce")
    except (ValueError, re.error) as error:  # re.error: pandas builds an invalid expression if a code occurs twice
        fault = f" ({error})"
    else:
        if "%" in time_format:
            return _zoned(Reading("format", time_format), _texts(column).dropna(), where)
        fault = ""
    raise UserError(
        f"{where}: data.time_format={time_format!r} is invalid{fault}; use {', '.join(ORDERS['numbers'])}, codes such "
        f"as %d/%m/%Y %H:%M, or {', '.join(EPOCHS)} for numbers since 1970"
    )


def _numbers(numbers: pd.Series) -> Reading | None:
    """Return the reading of numbers since 1970 or of dates written as numbers; None for other numbers."""
    values = numbers.to_numpy()
    if not len(values) or not np.isfinite(values).all():
        return None
    low, high = values.min(), values.max()
    whole = values.dtype.kind in "iu" or bool((values == np.floor(values)).all())
    length = len(str(int(low))) if low > 0 else 0
    if whole and length in _DIGITS and len(str(int(high))) == length:
        years = _YEARS[0] <= low // 10 ** (length - 4) and high // 10 ** (length - 4) <= _YEARS[1]
        # Numbers with the digits of a year, or of a year and month, are times only if none occurs twice.
        if years and (length >= 8 or numbers.is_unique):
            reading = Reading("digits", _DIGITS[length])
            if not np.isnat(reading.stamps(numbers)).any():
                return reading
    for unit, scale in EPOCHS.items():
        if _EARLIEST * scale <= low and high <= _LATEST * scale:
            return Reading("epoch", unit)
    return None


def _zoned(reading: Reading, texts: pd.Series, where: str) -> Reading:
    """Add the time zone in ``texts`` to ``reading``; of several UTC offsets (summer and winter), the last one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Arrow matches regular expressions faster than pandas.
    found = pc.match_substring_regex(pa.array(texts, type=pa.string(), from_pandas=True), _ZONED)
    has = found.fill_null(False).to_numpy(zero_copy_only=False)
    if not has.any():
        return reading
    if not has.all():
        without, given = texts.iloc[int(np.argmin(has))], texts.iloc[int(np.argmax(has))]
        raise UserError(f"{where}: {without!r} has no UTC offset, but {given!r} has one; write all times the same way")
    offset_of_last = _OFFSET.search(str(texts.iloc[-1]))
    sign, hours, minutes = offset_of_last.groups() if offset_of_last else ("+", "00", "00")
    offset = f"{sign}{hours}:{minutes or '00'}"
    return replace(reading, zone="UTC" if offset[1:] == "00:00" else offset)


def _family(texts: pd.Series, where: str) -> Reading:
    """Return the reading for the way in which most texts of a sample are written."""
    some = [str(text) for text in texts.iloc[np.linspace(0, len(texts) - 1, min(len(texts), _SAMPLE)).astype(int)]]
    counts = _counts(some)
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        guess = all(re.search(r"[A-Za-z]{3}", text) and re.search(r"\d{4}", text) for text in some)
        return Reading("words" if guess else "iso")
    if best == "iso":
        return Reading("iso")
    return _ordered(texts, best, where)


def _counts(texts: list[str]) -> dict[str, int]:
    """Count the texts that match each way of writing dates."""
    counts = {"iso": sum(_ISO.match(text) is not None for text in texts)}
    for name, pattern in FAMILIES.items():
        counts[name] = sum(re.fullmatch(pattern + TAIL, text) is not None for text in texts)
    return counts


def _ordered(texts: pd.Series, family: str, where: str) -> Reading:
    """Return the reading with the order of day, month and year that gives the fewest invalid dates.

    If several orders are possible, the one with a regular time step is chosen. UserError if they are still ambiguous.
    """
    orders = ORDERS.get(family, ("",))
    if len(orders) == 1:
        return Reading("parts", orders[0], family)
    unique = texts.drop_duplicates()
    for some in (unique.iloc[:_FIRST], unique):
        cut = DateTexts.of(map(str, some), family)
        found = {order: cut.times(order) for order in orders}
        bad = {order: int(np.isnat(stamps).sum()) for order, stamps in found.items()}
        if list(bad.values()).count(0) == 1:
            break  # only one order is possible
    left = {order: stamps for order, stamps in found.items() if bad[order] == min(bad.values())}
    for keep in (_distinct, _even, _rising):
        if len(left) > 1 and (keep is not _rising or "ymd" in left):
            left = keep(left) or left
    if len(left) > 1 and not min(bad.values()):
        one = next(text for row, text in enumerate(unique) if len({str(stamps[row]) for stamps in left.values()}) > 1)
        ways = " or ".join(f"{_in_words(order)} (data.time_format={order})" for order in left)
        raise UserError(
            f"{where}: {one!r} can be read as {ways}, and no other row resolves this; set data.time_format "
            "(--time-format), or write dates as 2020-12-31"
        )
    return Reading("parts", next(iter(left)), family)


def _distinct(found: dict[str, Stamps]) -> dict[str, Stamps]:
    """Keep only the first order if all orders give the same times."""
    first = next(iter(found))
    same = all(np.array_equal(stamps, found[first], equal_nan=True) for stamps in found.values())
    return {first: found[first]} if same else found


def _even(found: dict[str, Stamps]) -> dict[str, Stamps]:
    """Keep the orders that give a regular time step."""
    return {order: stamps for order, stamps in found.items() if _is_even(stamps)}


def _rising(found: dict[str, Stamps]) -> dict[str, Stamps]:
    """Keep the orders that give sorted times; needed for two-digit years, which also read as dates back to front."""
    steps = {order: np.diff(stamps).astype(np.int64) for order, stamps in found.items()}
    return {order: found[order] for order, step in steps.items() if (step > 0).all() or (step < 0).all()}


def _is_even(stamps: Stamps) -> bool:
    """Return whether the times, once sorted, have a regular time step."""
    times = np.unique(stamps[~np.isnat(stamps)])
    if len(times) < 3:
        return False
    months = times.astype("datetime64[M]")
    if _has_one_step(times) or (_has_one_step(months) and len(np.unique(times - months)) == 1):
        return True
    return has_frequency(times)


def _has_one_step(times: Stamps) -> bool:
    return len(np.unique(np.diff(times).astype(np.int64))) == 1


def _in_words(order: str) -> str:
    """Spell out an order such as "dmy"."""
    return ", ".join({"d": "day", "m": "month", "y": "year"}[letter] for letter in order)
