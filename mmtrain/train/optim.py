"""AdamW with the right decay groups, and a learning rate that is a pure function of the step."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from mmtrain.config import OptimConfig


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
