"""Losses that jump: found by their distance from the median of the steps before."""

from __future__ import annotations

import statistics
from collections import deque

from mmtrain.config import TrainConfig


class SpikeWatch:
    """Notes the loss of every step; a spike is a loss above ``spike_factor`` times the median of the last ones.

    The first ``spike_window`` steps of a process are only noted: there is nothing to compare them with.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.factor = config.spike_factor
        self._last: deque[float] = deque(maxlen=config.spike_window)

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` (finite) is a spike; otherwise it is noted."""
        if self.factor is None:
            return False
        full = len(self._last) == self._last.maxlen
        if full and loss > self.factor * statistics.median(self._last):
            return True
        self._last.append(loss)
        return False
