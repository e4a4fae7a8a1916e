"""Forecasting windows: a lookback that the model reads, and the horizon after it. Windows are read on demand.

A table is one series of several variates. A panel has many series, and each window shows one of them. The base classes
here serve both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.fingerprint import Fingerprint
from mmtrain.data.series.split import Scaler
from mmtrain.data.series.timeline import Stamps
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
#: Stored values, float32 or float64.
Numbers = NDArray[np.floating]
Int64s = NDArray[np.int64]

Kind = TypeVar("Kind", bound=np.floating)

#: Number of windows in a block of the data order. A block has consecutive series, so that it is contiguous on disk.
#: Not configurable, since the order of the samples depends on it.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Spans:
    """The windows of a split, given by the row of their first target in each series."""

    begin: Int64s  # (S,) first target of the first window
    counts: Int64s  # (S,) number of windows
    stride: int  # rows between the starts of windows

    @classmethod
    def of(cls, begin: Int64s, end: Int64s, lookback: int, horizon: int, stride: int = 1) -> Spans:
        """Find the windows whose targets are all in rows [begin, end) (S,) and whose lookback is within the series."""
        if min(lookback, horizon, stride) < 1:
            raise UserError(f"lookback={lookback}, horizon={horizon}, stride={stride}: each must be at least 1")
        first = np.maximum(begin, lookback)
        return cls(first, np.maximum((end - horizon - first) // stride + 1, 0), stride)

    def blocks(self) -> list[int]:
        """Return the sizes of blocks of whole series, each with :data:`BLOCK` windows or slightly more."""
        ends = np.cumsum(self.counts)
        cuts = [0]
        while cuts[-1] < ends[-1]:
            cuts.append(int(ends[min(int(np.searchsorted(ends, cuts[-1] + BLOCK)), len(ends) - 1)]))
        return np.diff(cuts).tolist()


class Covariates(Protocol):
    """Model inputs other than the values of the series."""

    def batch(self, series: Int64s, stop: Int64s, variates: int) -> dict[str, Tensor]:
        """Return the covariates of windows of ``series`` (B,) whose targets end before row ``stop`` (B,).

        Returns:
            "known" (B, T_Z, M, C_Z): known in advance for the T_Z rows before ``stop``. "static": (B, M, C_S). Each is
            left out if there are no such covariates.
        """
        ...


class Windows(ABC):
    """Data source of standardised windows: "past" (B, L, M) and "future" (B, H, M), float32, and covariates.

    Args:
        masked: add "mask" (B, L, M) and "future_mask" (B, H, M), True where a value was observed; missing values are 0.
    """

    def __init__(
        self, spans: Spans, lookback: int, horizon: int, covariates: Covariates | None = None, *, masked: bool = False
    ) -> None:
        self.spans, self.covariates, self.masked = spans, covariates, masked
        self.lookback, self.horizon = lookback, horizon
        self.block_sizes = spans.blocks()
        self._ends = np.cumsum(spans.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @abstractmethod
    def read(self, series: Int64s, start: Int64s, length: int) -> Floats:
        """Return a copy of rows [start, start + length) of each series (B,), standardised, NaN where missing.

        Returns:
            float32 (B, length, M).
        """

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """Return the series of each window, and the row of its first target in that series."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}")
        series = np.searchsorted(self._ends, indices, side="right")
        number = indices - (self._ends[series] - self.spans.counts[series])
        return series, self.spans.begin[series] + number * self.spans.stride

    def fetch(self, indices: Int64s, keys: NDArray[np.uint64] | None) -> dict[str, Tensor]:
        """Read the windows ``indices`` (B,) as a batch. ``keys`` (random keys) are not used."""
        import torch

        series, target = self.locate(indices)
        past = self.read(series, target - self.lookback, self.lookback)
        future = self.read(series, target, self.horizon)
        batch = {"past": torch.from_numpy(past), "future": torch.from_numpy(future)}
        for name, values in (("mask", past), ("future_mask", future)) if self.masked else ():
            seen = np.isfinite(values)
            if not seen.all():
                values[~seen] = 0
            batch[name] = torch.from_numpy(seen)
        if self.covariates is not None:
            batch |= self.covariates.batch(series, target + self.horizon, past.shape[2])
        return batch


class WindowOrigin(NamedTuple):
    """The part of the data that a window shows."""

    labels: list[str]  # names of the M variates
    scaler: Scaler  # of the variates
    rows: Int64s  # (L + H,) rows of the series
    stamps: Stamps | None  # (L + H,) times; None for data without times


@dataclass(frozen=True)
class ForecastingData(ABC):
    """The windows of the splits of a table or a panel."""

    train: Windows
    val: Windows
    test: Windows
    path: Path
    columns: list[str]  # names of the M variates of a window
    known: list[str]  # names of the C_Z covariates known in advance
    static: dict[str, int]  # for each static covariate, how many numbers encode it

    def origin(self, source: Windows, index: int) -> WindowOrigin:
        """Return the origin of window ``index`` of one of the splits, which gives its names, units and times."""
        series, target = (int(found[0]) for found in source.locate(np.array([index])))
        return self._origin(series, np.arange(target - source.lookback, target + source.horizon))

    @abstractmethod
    def _origin(self, series: int, rows: Int64s) -> WindowOrigin: ...

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Return the names of the columns, and digests of the training rows."""

    @abstractmethod
    def assets(self) -> dict[str, Any]:
        """Return what prediction needs in addition to the names of the columns, such as the scaler, as JSON values."""


def known_steps(wanted: int, lookback: int, horizon: int) -> int:
    """Return T_Z, the time steps of known covariates in a window; they end with its last target.

    Args:
        wanted: ``model.future_length``; 0: lookback + horizon.

    Raises:
        UserError: if ``wanted`` is more than a window has.
    """
    if wanted > lookback + horizon:
        raise UserError(
            f"model.future_length={wanted}: must be at most model.lookback + model.horizon = {lookback + horizon} time "
            "steps, or 0 for all of them"
        )
    return wanted or lookback + horizon


def runs(values: NDArray[Kind], first: Int64s, length: int) -> NDArray[Kind]:
    """Return a copy (n, length, C) of rows [f, f + length) of ``values`` (T, C) for each f in ``first`` (n,).

    ``values`` must have contiguous rows, and every run must be within them; the latter is not checked. Each run is
    copied as one block of memory, which is more than ten times as fast as gathering row by row.
    """
    if not length or not len(first):
        return np.empty((len(first), length, values.shape[1]), dtype=values.dtype)
    row, item = values.strides
    assert row == item * values.shape[1], "rows must be contiguous"
    shape = (len(values) - length + 1, length * values.shape[1])
    view = np.lib.stride_tricks.as_strided(values, shape, (row, item), writeable=False)
    return view[first].reshape(len(first), length, values.shape[1])


def known_batch(known: Floats, variates: int) -> Tensor:
    """Expand (B, T_Z, C_Z) to a view (B, T_Z, M, C_Z) that repeats the covariates for each of the M variates."""
    import torch

    b, steps, width = known.shape
    return torch.from_numpy(known).unsqueeze(2).expand(b, steps, variates, width)
