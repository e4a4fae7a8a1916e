"""Calendar features: what a date says, as numbers in [-0.5, 0.5], as in Informer.

They follow from the date alone, so they are known for any future.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.series.timeline import UNITS, Stamps, Step

#: Each feature with the span (µs) after which it comes round; a step of whole spans never changes it.
_PERIODS = {"second": UNITS["min"], "minute": UNITS["h"], "hour": UNITS["D"], "weekday": UNITS["W"]}
FEATURES = (*_PERIODS, "day", "yearday", "month")


def calendar_names(step: Step) -> list[str]:
    """The features that vary over steps of ``step``: hour, weekday, day, yearday and month for hourly data."""
    if step.months:
        return ["month"] if step.count % 12 else []
    length = step.count * UNITS["D"] if step.business else step.count
    return [name for name in FEATURES if name not in _PERIODS or length % _PERIODS[name]]


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
