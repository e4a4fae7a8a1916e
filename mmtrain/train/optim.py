"""Optimizer, learning-rate schedule, averaged weights (EMA), arithmetic precision, and the random seed of each step."""

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
    """Build an AdamW optimizer with two groups: parameters with and without weight decay (see :func:`decays`)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if not decays(p)], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to ``parameter``.

    It does not apply to vectors (biases, gains), nor to parameters marked ``_no_weight_decay``: A_log, D, the bias of
    Δ, and the weights of the weighted averaging.
    """
    return parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)


def learning_rate(config: OptimConfig, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of one step: linear warm-up, then constant or cosine decay (``optim.schedule``).

    Args:
        step: index of the step, from 0.
        steps: number of steps of the run, warm-up included.
        warmup: number of warm-up steps.
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


class WeightAverage:
    """Exponential moving average of the weights: w̄ ← d·w̄ + (1 - d)·w after each step.

    The decay warms up: d = min(decay, (1 + t)/(10 + t)), where t is the number of earlier updates. ``weights`` are this
    rank's shards of the parameters (``Strategy.local_parameters``). The update is local and elementwise, so a sharded
    average needs no communication.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """Move the average towards ``weights``. ``step`` is the number of updates before this one."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(to_local(average), to_local(weights[name].detach())) for name, average in self.shadow.items()]
        averages, current = zip(*[pair for pair in pairs if pair[0].numel()], strict=True)
        torch._foreach_lerp_(list(averages), list(current), 1 - decay)

    @torch.no_grad()
    def reset(self, weights: dict[str, Tensor]) -> None:
        """Set the average to ``weights``."""
        for name, average in self.shadow.items():
            to_local(average).copy_(to_local(weights[name].detach()))

    @contextmanager
    def applied(self, weights: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
        """Put the averaged weights into the model within this context.

        ``weights`` returns the model's weights. It is called on entry and again on exit.
        """
        self._swap(weights())
        try:
            yield
        finally:
            self._swap(weights())

    @torch.no_grad()
    def _swap(self, weights: dict[str, Tensor]) -> None:
        """Exchange the values of the average and of ``weights``."""
        for name, parameter in weights.items():
            average, weight = to_local(self.shadow[name]), to_local(parameter.detach())
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the lower-precision dtype of autocast, or None if ``train.precision`` uses no autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)


def set_up_arithmetic(config: TrainConfig) -> None:
    """Configure TF32 for float32 matrix products (``train.tf32``) and deterministic algorithms for the process."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global random generators of torch, NumPy and Python from (seed, step, rank).

    mmtrain itself does not use them. Other code that uses them gives the same results after a resume, and checkpoints
    need no generator state.
    """
    value = int(mix64(seed, step, rank)[0])
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # before that, torch.manual_seed queues each call together with a stack trace
        torch.cuda.manual_seed_all(value)
    np.random.seed(value % 2**32)
    random.seed(value)
