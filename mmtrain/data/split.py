"""Training, validation and test rows of a time series, and the standardisation fitted on the training rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError, nearest

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


def guess_split(name: str) -> str | tuple[float, float, float]:
    """The split which the benchmarks use for a table of this name: ETTh*, ETTm*, else 70/10/20 %."""
    found = re.match(r"ett([hm])\d", name.lower())
    return f"ett{found[1]}" if found else RATIOS


@dataclass(frozen=True)
class Scaler:
    """Standardisation per column. Columns that do not vary keep their scale (std 1)."""

    mean: NDArray[np.float32]  # (M,)
    std: NDArray[np.float32]  # (M,)

    @classmethod
    def fit(cls, values: NDArray[np.floating]) -> Scaler:
        """Mean and population deviation of the rows given: the training rows, never others, and without holes."""
        if np.isnan(values).any():
            values = np.where(np.isnan(values).all(axis=0), 0, values)  # a column without a number: mean 0, deviation 1
            return cls._fit(np.nanstd, np.nanmean, values)
        return cls._fit(np.std, np.mean, values)

    @classmethod
    def _fit(cls, deviation: Any, average: Any, values: NDArray[np.floating]) -> Scaler:
        std = deviation(values, axis=0, dtype=np.float64)
        # A constant column's deviation is rounding noise of its mean, not exactly 0.
        constant = np.nanmax(values, axis=0) == np.nanmin(values, axis=0)
        std[constant | (std.astype(np.float32) == 0)] = 1.0
        return cls(average(values, axis=0, dtype=np.float64).astype(np.float32), std.astype(np.float32))

    def transform(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """(..., M) → standardised, float32."""
        return ((values - self.mean.astype(np.float64)) / self.std).astype(np.float32)

    def inverse(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """(..., M) standardised → the table's units, float32."""
        return (values * self.std.astype(np.float64) + self.mean).astype(np.float32)

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Scaler:
        return cls(np.asarray(saved["mean"], dtype=np.float32), np.asarray(saved["std"], dtype=np.float32))
