"""Forecasting windows: a look-back that the model reads and the horizon behind it, numbered and read on demand.

A table is one series of several variates; a panel has many series, and a window shows one of them. Both are numbered,
read and described through the classes here.
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
#: Values as they are stored, float32 or float64.
Numbers = NDArray[np.floating]
Int64s = NDArray[np.int64]

Kind = TypeVar("Kind", bound=np.floating)

#: Windows in a block of the data order: consecutive series, so that a block lies together on disk. A constant, since
#: the order of the samples depends on it.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Spans:
    """The first targets of a split's windows: series s has ``counts[s]`` of them, from row ``begin[s]`` on."""

    begin: Int64s
    counts: Int64s
    stride: int

    @classmethod
    def of(cls, begin: Int64s, end: Int64s, lookback: int, horizon: int, stride: int = 1) -> Spans:
        """Windows whose targets all lie in rows [begin, end) (S,), and whose look-back lies in the series."""
        if min(lookback, horizon, stride) < 1:
            raise UserError(f"lookback={lookback}, horizon={horizon}, stride={stride}: each must be 1 or more")
        first = np.maximum(begin, lookback)
        return cls(first, np.maximum((end - horizon - first) // stride + 1, 0), stride)

    def blocks(self) -> list[int]:
        """Sizes of blocks of whole series, each of :data:`BLOCK` windows or a little more."""
        ends = np.cumsum(self.counts)
        cuts = [0]
        while cuts[-1] < ends[-1]:
            cuts.append(int(ends[min(int(np.searchsorted(ends, cuts[-1] + BLOCK)), len(ends) - 1)]))
        return np.diff(cuts).tolist()


class Covariates(Protocol):
    """Inputs of the model beside the values."""

    def batch(self, series: Int64s, stop: Int64s, variates: int) -> dict[str, Tensor]:
        """Covariates of windows of ``series`` (B,) whose targets end before row ``stop`` (B,), as far as there are any.

        "known" (B, T_Z, M, C_Z) is known in advance for the T_Z rows before ``stop``; "static" is (B, M, C_S).
        """
        ...


class Windows(ABC):
    """Source of standardised {"past": float32 (B, L, M), "future": float32 (B, H, M)} and the ``covariates``.

    With ``masked`` also "mask" (B, L, M) and "future_mask" (B, H, M): True where a value was observed; holes are 0.
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
        """(B, length, M): rows [start, start + length) of each series (B,), standardised; a copy, with NaN in holes."""

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """The series of each window, and the row of its first target in that series."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}")
        series = np.searchsorted(self._ends, indices, side="right")
        number = indices - (self._ends[series] - self.spans.counts[series])
        return series, self.spans.begin[series] + number * self.spans.stride

    def fetch(self, indices: Int64s, keys: NDArray[np.uint64] | None) -> dict[str, Tensor]:
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
    """The origin of a window: names of its M variates, their scaler, and its L + H rows with their times, if any."""

    labels: list[str]
    scaler: Scaler
    rows: Int64s
    stamps: Stamps | None


@dataclass(frozen=True)
class ForecastingData(ABC):
    """The splits of a table or a panel.

    ``columns``: the M variates of a window. ``known``: the C_Z covariates known in advance. ``static``: how many
    numbers each static covariate becomes.
    """

    train: Windows
    val: Windows
    test: Windows
    path: Path
    columns: list[str]
    known: list[str]
    static: dict[str, int]

    def origin(self, source: Windows, index: int) -> WindowOrigin:
        """The origin of window ``index`` of one of the splits, to show it in the units of the data."""
        series, target = (int(found[0]) for found in source.locate(np.array([index])))
        return self._origin(series, np.arange(target - source.lookback, target + source.horizon))

    @abstractmethod
    def _origin(self, series: int, rows: Int64s) -> WindowOrigin: ...

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """The names of its columns, and digests of the rows that are trained on."""

    @abstractmethod
    def assets(self) -> dict[str, Any]:
        """JSON values that prediction needs beside the columns."""


def known_steps(wanted: int, lookback: int, horizon: int) -> int:
    """T_Z of ``model.future_length``: the steps of known covariates, which end with the last target.

    Raises:
        UserError: for more steps than a window has.
    """
    if wanted > lookback + horizon:
        raise UserError(
            f"model.future_length={wanted}: a window has model.lookback + model.horizon = {lookback + horizon} steps; "
            "give at most so many, or 0 for all"
        )
    return wanted or lookback + horizon


def runs(values: NDArray[Kind], first: Int64s, length: int) -> NDArray[Kind]:
    """Rows [f, f + length) of ``values`` (T, C), contiguous, for each f of ``first`` (n,): a copy (n, length, C).

    Every run must lie within the rows; this is not checked. One block of memory is copied for each run, which is more
    than ten times as fast as gathering row by row.
    """
    if not length or not len(first):
        return np.empty((len(first), length, values.shape[1]), dtype=values.dtype)
    row, item = values.strides
    assert row == item * values.shape[1], "rows must lie one after the other"
    shape = (len(values) - length + 1, length * values.shape[1])
    view = np.lib.stride_tricks.as_strided(values, shape, (row, item), writeable=False)
    return view[first].reshape(len(first), length, values.shape[1])


def known_batch(known: Floats, variates: int) -> Tensor:
    """(B, T_Z, C_Z) → (B, T_Z, M, C_Z), the same for each variate and held once."""
    import torch

    b, steps, width = known.shape
    return torch.from_numpy(known).unsqueeze(2).expand(b, steps, variates, width)
