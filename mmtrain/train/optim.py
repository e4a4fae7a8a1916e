"""The optimizer, its learning rate, the average of the weights (EMA), number formats, and the seed of each step."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mmtrain.config import OptimConfig, TrainConfig
from mmtrain.data.core.order import mix64
from mmtrain.parallel.strategy import to_local


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW in two groups: with weight decay, and without (see :func:`decays`)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if not decays(p)], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def decays(parameter: nn.Parameter) -> bool:
    """False for biases, gains and what is marked ``_no_weight_decay`` (A_log, D, the bias of Δ, averages)."""
    return parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)


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

    ``weights`` is this rank's part of each weight (``Strategy.local_parameters``). The update is local and element by
    element, so a split average costs no communication.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """``step``: how many steps were taken, this one not counted."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(to_local(mine), to_local(weights[name].detach())) for name, mine in self.shadow.items()]
        mine, current = zip(*[pair for pair in pairs if pair[0].numel()], strict=True)
        torch._foreach_lerp_(list(mine), list(current), 1 - decay)

    @torch.no_grad()
    def reset(self, weights: dict[str, Tensor]) -> None:
        """Start again from the weights."""
        for name, mine in self.shadow.items():
            to_local(mine).copy_(to_local(weights[name].detach()))

    @contextmanager
    def applied(self, weights: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
        """Within the context the model holds the averaged weights. ``weights`` is asked anew for each exchange."""
        self._swap(weights())
        try:
            yield
        finally:
            self._swap(weights())

    @torch.no_grad()
    def _swap(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in weights.items():
            mine, theirs = to_local(self.shadow[name]), to_local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """What autocast narrows to; None without autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)


def set_up_arithmetic(config: TrainConfig) -> None:
    """TF32 for float32 matrix products on GPUs that have it, and deterministic algorithms where asked for."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the global generators of torch, numpy and Python from (seed, step, rank).

    Nothing of ours draws from them. Code that does is then the same after a restart, with no state to save.
    """
    value = int(mix64(seed, step, rank)[0])
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # torch.manual_seed would note the call for later, with a traceback, every step
        torch.cuda.manual_seed_all(value)
    np.random.seed(value % 2**32)
    random.seed(value)
