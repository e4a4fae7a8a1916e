"""The models, built by name or from their configuration.

Here belong the architectures (``vim2``, ``tsm2``), their parts (``mixers``, ``s6``, ``averaging``, ``stochastic``),
their initial weights and the recurrent mode of a causal mixer (``streaming``). Kernels belong in ``mmtrain.ops``.
Losses, optimizers and everything else that trains belong in ``mmtrain.tasks`` and ``mmtrain.train``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmtrain.config import MODELS, ForecasterConfig, ImageModelConfig, ModelConfig
from mmtrain.config.models import preset
from mmtrain.errors import UserError


def list_models(pattern: str = "*") -> list[str]:
    """The names that :func:`create_model` knows, filtered by a shell pattern such as ``vim2*``."""
    MODELS.discover()
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
    pyramid = getattr(model, "pyramid", None)
    if pyramid is None:
        raise UserError(f"features_only: model '{name}' has no pyramid of feature maps")
    return cast(nn.Module, pyramid(out_indices))


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model that ``config`` describes, with fresh weights from torch's generator."""
    return cast(nn.Module, MODELS.implementation(config)(config))


def example_inputs(
    config: ModelConfig, *, batch: int = 1, image_size: tuple[int, int] = (224, 224), variates: int = 7
) -> tuple[Tensor | None, ...]:
    """Zeros on the current default device, as the positional inputs of the model of ``config``."""
    if isinstance(config, ImageModelConfig):
        return (torch.zeros(batch, config.in_channels, *image_size),)
    if not isinstance(config, ForecasterConfig):
        raise UserError(f"model '{config.name}': it takes neither images nor series, so its inputs are not known")
    past, more = torch.zeros(batch, config.lookback, variates), config.auxiliary
    mask = torch.ones_like(past, dtype=torch.bool) if more.mask else None
    static = torch.zeros(batch, variates, more.static) if more.static else None
    known = torch.zeros(batch, more.steps, variates, more.future) if more.future else None
    return past, mask, static, known
