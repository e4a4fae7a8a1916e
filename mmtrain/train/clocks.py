"""Borders in time, on a CPU and on a GPU.

On a CPU a border is a reading of the clock. On a GPU it is an event put into the stream, so what is measured is when
the GPU came past it: work that the CPU only queued is counted where it runs, and a wait for data that the GPU did not
notice, being busy still, counts as nothing.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Borders in time, cheap to set and read later."""

    def now(self) -> Any:
        """A border."""

    def gaps(self, borders: list[Any]) -> list[float]:
        """Seconds between each border and the next; the borders are not used again."""


class HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def gaps(self, borders: list[float]) -> list[float]:
        return [after - before for before, after in pairwise(borders)]


class CudaClock:
    """Events in the current stream of ``device``, used again once they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def gaps(self, borders: list[torch.cuda.Event]) -> list[float]:
        borders[-1].synchronize()
        gaps = [before.elapsed_time(after) / 1000 for before, after in pairwise(borders)]
        self._free += borders
        return gaps


def clock_of(device: torch.device) -> Clock:
    """The clock of what ``device`` does."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
