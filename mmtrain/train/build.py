"""Build the distributed model of a task, compiled and with recomputation as configured. Weights are not set yet."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import mmtrain.ops  # noqa: F401 - defines torch.ops.mmtrain
from mmtrain.config import RunConfig, TrainConfig
from mmtrain.errors import SharedError, UserError
from mmtrain.models.averaging import MixerStack, model_blocks
from mmtrain.parallel.build import build_strategy
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import Strategy, StrategyOptions
from mmtrain.tasks import Task
from mmtrain.train.optim import autocast_dtype, build_optimizer

_aten = torch.ops.aten
#: Operations whose results selective checkpointing keeps: they are expensive to compute and small to store.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    torch.ops.mmtrain.linear_fwd.default,
    torch.ops.mmtrain.selective_mix_fwd.default,
    torch.ops.mmtrain.selective_scan_fwd.default,
}


def micro_batches(config: RunConfig, world: int) -> int:
    """Return the number of micro-batches per step on each rank.

    It is the smallest number, from ``train.accumulation`` up, that divides the global batch evenly over ``world`` ranks
    into micro-batches of at most ``train.micro_batch`` samples. The global batch is the same for any number of ranks.

    Raises:
        SharedError: if the ranks do not divide the batch. The message lists numbers of ranks that do.
    """
    batch, most = config.train.batch_size, config.train.micro_batch
    for micros in range(config.train.accumulation, batch // world + 1):
        size, rest = divmod(batch, world * micros)
        if rest == 0 and (most is None or size <= most):
            return micros
    unit = world * config.train.accumulation
    fits = [n for n in range(1, batch + 1) if batch % n == 0 and batch // n >= config.train.accumulation]
    near = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
    raise SharedError(
        f"train.batch_size={batch} is not divisible by {world} ranks × train.accumulation={config.train.accumulation}."
        f" Possible numbers of ranks: {', '.join(map(str, fits[-12:])) or 'none'}. Or use a multiple of {unit} for"
        f" train.batch_size ({' or '.join(map(str, near))})"
    )


def parallelize_model(config: RunConfig, task: Task, ranks: Ranks, micros: int) -> Strategy:
    """Build the model of ``task``, compile it if configured, and distribute it over the ranks.

    Args:
        micros: number of micro-batches per step (:func:`micro_batches`).

    Returns:
        The strategy with the model and its optimizer. The parameters have memory, but no values yet.
    """
    model = build_meta_model(task)
    checkpoint_activations(model, config.train)
    blocks = model_blocks(model)
    if config.train.compile:
        for block in blocks:
            block.compile()
    options = StrategyOptions(
        ranks,
        config.parallel,
        blocks,
        lambda sharded: build_optimizer(sharded, config.optim),
        autocast=autocast_dtype(config.train),
        micro_batches=micros,
        micro_batch_size=config.train.batch_size // (ranks.world * micros),
        plain=not config.train.compile and config.train.checkpointing == "none",
    )
    return build_strategy(model, options)


def build_meta_model(task: Task) -> nn.Module:
    """Build the model of ``task`` on the meta device: shapes without memory."""
    with torch.device("meta"):
        return task.build_model()


def checkpoint_activations(model: nn.Module, config: TrainConfig) -> None:
    """Set up recomputation of activations (``train.checkpointing``).

    Raises:
        UserError: if the model does not support it.
    """
    if config.checkpointing == "none":
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise UserError(
            f"train.checkpointing={config.checkpointing}: {type(model).__name__} does not support recomputation."
            " Use train.checkpointing=none"
        )
    switch(True, config.checkpointing_every)
    if config.checkpointing == "selective":
        for module in model.modules():
            if isinstance(module, MixerStack):
                module.checkpoint_contexts = partial(create_selective_checkpoint_contexts, _keep_or_recompute)


def _keep_or_recompute(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return whether selective checkpointing keeps the result of operation ``op`` or recomputes it."""
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
