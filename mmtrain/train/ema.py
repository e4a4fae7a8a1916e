"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmtrain.parallel.torch_strategy import local


class WeightAverage:
    """Keeps w̄ ← d·w̄ + (1 - d)·w after each step, with d = min(decay, (1 + t)/(10 + t)) so that it warms up.

    ``held`` is this rank's part of each weight (``Strategy.held``): all is local and element by element, so a split
    average costs no communication.
    """

    def __init__(self, held: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in held.items()}

    @torch.no_grad()
    def update(self, held: dict[str, Tensor], step: int) -> None:
        """``step``: how many steps were taken, this one not counted."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(local(mine), local(held[name].detach())) for name, mine in self.shadow.items()]
        mine, current = zip(*[pair for pair in pairs if pair[0].numel()], strict=True)
        torch._foreach_lerp_(list(mine), list(current), 1 - decay)

    @torch.no_grad()
    def reset(self, held: dict[str, Tensor]) -> None:
        """Start again from the weights."""
        for name, mine in self.shadow.items():
            local(mine).copy_(local(held[name].detach()))

    @contextmanager
    def applied(self, held: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
        """Within the context the model holds the averaged weights. ``held`` is asked anew for each exchange."""
        self._swap(held())
        try:
            yield
        finally:
            self._swap(held())

    @torch.no_grad()
    def _swap(self, held: dict[str, Tensor]) -> None:
        for name, parameter in held.items():
            mine, theirs = local(self.shadow[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
