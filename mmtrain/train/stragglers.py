"""Which rank holds the others up."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmtrain.parallel.ranks import Ranks

logger = logging.getLogger("mmtrain")

#: A rank that takes so many times the median is worth a warning, at most once in so many seconds.
_SLOW, _WARN_EVERY = 1.3, 600.0


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, its busy seconds a step, the median of all ranks, and the ratio of the two."""

    rank: int
    seconds: float
    median: float
    ratio: float

    def line(self) -> dict[str, float]:
        """For a line of metrics."""
        return {
            "slowest_rank": self.rank,
            "slowest_seconds": self.seconds,
            "median_seconds": self.median,
            "slowest_ratio": self.ratio,
        }


def stragglers(ranks: Ranks, busy_seconds: float) -> Straggler | None:
    """The slowest rank, the same answer on every rank; None if there is but one. A collective: all ranks call it.

    Args:
        busy_seconds: a step of this rank without its waiting for the others (``Timings.busy``): with it, all ranks
            would take as long as the slowest.
    """
    if ranks.world == 1:
        return None
    mine = torch.tensor([busy_seconds], dtype=torch.float64, device=ranks.device)
    every = mine.new_empty(ranks.world)
    dist.all_gather_single(every, mine)
    return slowest(every.tolist())


def slowest(seconds: list[float]) -> Straggler:
    """Of the busy seconds of each rank; the first one if several are equally slow."""
    most, median = max(seconds), statistics.median(seconds)
    return Straggler(seconds.index(most), most, median, most / median if median > 0 else 1.0)


class StragglerWatch:
    """:func:`stragglers`, with a warning now and then on rank 0 when one is 1.3 times as slow as the median."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._warned_at = -_WARN_EVERY

    def check(self, busy_seconds: float) -> Straggler | None:
        """A collective, as :func:`stragglers`; the warning itself waits for nobody."""
        found = stragglers(self.ranks, busy_seconds)
        if found and self.ranks.main and found.ratio > _SLOW and time.monotonic() - self._warned_at >= _WARN_EVERY:
            self._warned_at = time.monotonic()
            logger.warning(
                "rank %d holds the others up: it is busy for %.3f s a step, the median is %.3f s (× %.2f)",
                found.rank,
                found.seconds,
                found.median,
                found.ratio,
            )
        return found
