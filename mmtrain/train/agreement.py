"""What all ranks must know before the optimizer's step, in one small all-reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmtrain.parallel.ranks import Ranks


@dataclass(frozen=True)
class Agreement:
    """The same on every rank. ``loss``: the mean over ranks; NaN when it is not finite on some rank."""

    loss: float
    stop: bool
    save: bool
    save_failed: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


def agree(ranks: Ranks, loss: float, *, stop: bool, save: bool, save_failed: bool) -> Agreement:
    """Share this rank's ``loss`` and wishes: one rank's wish to stop or save is everybody's."""
    finite = math.isfinite(loss)
    mine = [loss if finite else 0.0, float(not finite), float(stop), float(save), float(save_failed)]
    total, broken, stops, saves, failures = ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    return Agreement(math.nan if broken else total / ranks.world, stops > 0, saves > 0, failures > 0)
