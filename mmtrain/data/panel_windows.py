"""Forecasting windows over a panel: one series a sample, numbered and read when they are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.panel import Panel
from mmtrain.data.panel_inputs import PanelInputs
from mmtrain.data.windows import hide_holes, known_batch, runs
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Int64s = NDArray[np.int64]

#: Windows in a block of the data clock: consecutive series, so that a block lies together on disk. A constant, since
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
        first = np.maximum(begin, lookback)
        return cls(first, np.maximum((end - horizon - first) // stride + 1, 0), stride)


class PanelWindows:
    """Source of {"past": float32 (B, L, C), "future": float32 (B, H, C)} for the C columns of one series a sample.

    Both are standardised by the series' own scaler. With ``inputs`` that the model wants also "static" (B, C, C_S) and
    "known" (B, T_Z, C, C_Z); with ``masked`` "mask" (B, L, C) and "future_mask" (B, H, C), True where observed, and 0
    in the place of holes.
    """

    def __init__(
        self, panel: Panel, spans: Spans, lookback: int, horizon: int, inputs: PanelInputs, *, masked: bool = False
    ) -> None:
        if min(lookback, horizon, spans.stride) < 1:
            raise UserError(f"lookback={lookback}, horizon={horizon}, stride={spans.stride}: each must be 1 or more")
        self.panel, self.spans, self.inputs, self.masked = panel, spans, inputs, masked
        self.lookback, self.horizon = lookback, horizon
        self.ends = np.cumsum(spans.counts)
        self.block_sizes = _blocks(spans.counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        """The series of each window, and the row of its first target in that series."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"windows are numbered 0 to {len(self) - 1}")
        series = np.searchsorted(self.ends, indices, side="right")
        number = indices - (self.ends[series] - self.spans.counts[series])
        return series, self.spans.begin[series] + number * self.spans.stride

    def fetch(self, indices: Int64s, keys: NDArray[np.uint64] | None) -> dict[str, Tensor]:
        import torch

        columns = len(self.panel.columns)
        series, target = self.locate(indices)
        past = self._scaled(series, target - self.lookback, self.lookback)
        future = self._scaled(series, target, self.horizon)
        batch = hide_holes(past, future) if self.masked else {}
        batch |= {"past": torch.from_numpy(past), "future": torch.from_numpy(future)}
        if self.inputs.known_width:
            known = self.inputs.known(series, target + self.horizon - self.inputs.steps)
            batch["known"] = known_batch(known, columns)
        if self.inputs.static_width:
            batch["static"] = torch.from_numpy(self.inputs.static[series]).unsqueeze(1).expand(-1, columns, -1)
        return batch

    def _scaled(self, series: Int64s, start: Int64s, length: int) -> NDArray[np.float32]:
        made = gather(self.panel, series, start, length)
        made -= self.inputs.scalers.mean[series][:, None]
        made /= self.inputs.scalers.std[series][:, None]
        return made


def gather(panel: Panel, series: Int64s, start: Int64s, length: int) -> NDArray[np.float32]:
    """(B, length, C): rows [start, start + length) of each series (B,), in the units of the data, NaN in holes."""
    made = np.empty((len(series), length, len(panel.columns)), dtype=np.float32)
    shards = panel.shards[series]
    for shard in np.unique(shards).tolist():
        mine = np.flatnonzero(shards == shard)
        made[mine] = runs(panel.values[shard], panel.offsets[series[mine]] + start[mine], length)
    return made


def _blocks(counts: Int64s) -> list[int]:
    """Sizes of blocks of whole series, each of :data:`BLOCK` windows or a little more."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return []
    cuts = [0]
    while cuts[-1] < total:
        cuts.append(int(ends[min(int(np.searchsorted(ends, cuts[-1] + BLOCK)), len(ends) - 1)]))
    return np.diff(cuts).tolist()
