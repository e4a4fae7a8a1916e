"""AdamW with the right decay groups, and a learning rate that is a pure function of the step.

An exponential moving average of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mmtrain.config import OptimConfig
from mmtrain.parallel.torch_strategy import local


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW; biases, gains and what is marked ``_no_weight_decay`` (A_log, D, the bias of Δ, averages) do not decay."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or getattr(parameter, "_no_weight_decay", False)
            (rest if exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    first, second = config.betas
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int, warmup: int) -> float:
    """The learning rate of step ``step`` of ``steps`` (counted from 0), after ``warmup`` steps of linear warm-up."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


class WeightAverage:
    """Keeps w̄ ← d·w̄ + (1 - d)·w after each step, with d = min(decay, (1 + t)/(10 + t)) so that it warms up.

    ``held`` is this rank's part of each weight (``Strategy.local_parameters``): all is local and element by
    element, so a split
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
