"""Models by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.config import MODELS, ModelConfig, TSM2Config, ViM2Config
from mmtrain.config.models import preset
from mmtrain.errors import UserError
from mmtrain.models.tsm2 import TSM2
from mmtrain.models.vim2 import ViM2, ViM2Features


def list_models(pattern: str = "*") -> list[str]:
    """The names that :func:`create_model` knows, filtered by a shell pattern such as ``vim2*``."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def create_model(
    name: str, *, features_only: bool = False, out_indices: Sequence[int] | None = None, **overrides: Any
) -> nn.Module:
    """Build the model called ``name``, with arguments of its configuration overridden.

    Examples: ``create_model("vim2_small", num_classes=10)``; ``create_model("vim2_tiny", features_only=True)`` gives
    the pyramid of feature maps for dense tasks.

    Args:
        out_indices: the stages of the pyramid (default: all).

    Raises:
        UserError: for an unknown name or argument, with the nearest one.
    """
    model = build_model(preset(name, **overrides))
    if not features_only:
        if out_indices is not None:
            raise UserError("out_indices goes with features_only=True")
        return model
    if not isinstance(model, ViM2):
        raise UserError(f"features_only: model '{name}' has no pyramid of feature maps")
    return ViM2Features(model, out_indices)


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model that ``config`` describes, with fresh weights from torch's generator."""
    if isinstance(config, ViM2Config):
        return ViM2(config)
    if isinstance(config, TSM2Config):
        return TSM2(config)
    raise TypeError(f"no model is registered for {type(config).__name__}")


def example_inputs(
    config: ModelConfig, *, batch: int = 1, image_size: tuple[int, int] = (224, 224), variates: int = 7
) -> tuple[Tensor | None, ...]:
    """Zeros on the current default device, as the positional inputs of the model of ``config``."""
    if isinstance(config, ViM2Config):
        return (torch.zeros(batch, config.in_channels, *image_size),)
    if not isinstance(config, TSM2Config):
        raise UserError(f"model '{config.name}': {type(config).__name__} has no table of stages")
    steps = config.future_length or config.lookback + config.horizon
    static = torch.zeros(batch, variates, config.static_features) if config.static_features else None
    known = torch.zeros(batch, steps, variates, config.future_features) if config.future_features else None
    mask = torch.ones(batch, config.lookback, variates, dtype=torch.bool) if config.mask_input else None
    return torch.zeros(batch, config.lookback, variates), mask, static, known
