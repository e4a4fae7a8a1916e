"""Activation checkpointing: what is kept for the backward pass and what is computed again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import mmtrain.ops  # noqa: F401 - defines torch.ops.mmtrain
from mmtrain.config import TrainConfig
from mmtrain.errors import UserError
from mmtrain.models.averaging import MixerStack

_aten = torch.ops.aten
#: What the selective mode keeps: results that cost much to compute and little to hold.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    torch.ops.mmtrain.linear_fwd.default,
    torch.ops.mmtrain.selective_mix_fwd.default,
    torch.ops.mmtrain.selective_scan_fwd.default,
}


def checkpoint_activations(model: nn.Module, config: TrainConfig) -> None:
    """Set up the mode that ``train.checkpointing`` names.

    Raises:
        UserError: for a model that has no hooks for it.
    """
    if config.checkpointing == "none":
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise UserError(f"train.checkpointing is '{config.checkpointing}', but {type(model).__name__} cannot recompute")
    switch(True, config.checkpointing_every)
    if config.checkpointing == "selective":
        for module in model.modules():
            if isinstance(module, MixerStack):
                module.checkpoint_contexts = partial(create_selective_checkpoint_contexts, _policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
