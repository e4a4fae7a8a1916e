"""Activation checkpointing on the model that is planned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mmtrain.ops  # noqa: F401 - defines torch.ops.mmtrain
from mmtrain.config import TrainConfig
from mmtrain.models.averaging import MixerStack

_aten = torch.ops.aten
#: What the selective mode keeps: results of matrix products, convolutions and scans.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    torch.ops.mmtrain.linear_fwd.default,
    torch.ops.mmtrain.selective_mix_fwd.default,
    torch.ops.mmtrain.selective_scan_fwd.default,
}


def checkpoint_activations(model: nn.Module, train: TrainConfig) -> None:
    """Set ``train.checkpointing`` up in every stack of mixers of ``model``."""
    stacks = [module for module in model.modules() if isinstance(module, MixerStack)]
    if train.checkpointing == "full":
        for stack in stacks:
            stack.checkpoint_every = train.checkpointing_every
    elif train.checkpointing == "selective":
        for stack in stacks:
            branch = _selective(stack._branch, train.checkpointing_every)
            stack._branch = branch  # type: ignore[method-assign, assignment]


def _selective(branch: Callable[[Tensor, int], Tensor], every: int) -> Callable[[Tensor, int], Tensor]:
    contexts = partial(create_selective_checkpoint_contexts, _policy)

    def run(stream: Tensor, i: int) -> Tensor:
        if i % every:
            return branch(stream, i)
        return checkpoint(branch, stream, i, use_reentrant=False, context_fn=contexts)

    return run


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
