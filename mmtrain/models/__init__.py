"""The models, and functions that build them by name or from a configuration.

This package contains the architectures (``vim2``, ``tsm2``), their modules (``mixers``, ``s6``, ``averaging``,
``stochastic``), their initialisation (``initialise``) and the recurrent mode of causal mixers (``streaming``). Kernels
are in ``mmtrain.ops``, losses in ``mmtrain.tasks``, optimizers and the training loop in ``mmtrain.train``.
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
    """Return the names of the models, filtered by a shell pattern such as ``vim2*``."""
    MODELS.discover()
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def create_model(
    name: str, *, features_only: bool = False, out_indices: Sequence[int] | None = None, **overrides: Any
) -> nn.Module:
    """Build the model ``name``.

    Example::

        create_model("vim2_small", num_classes=10)

    Args:
        features_only: return the pyramid of feature maps for dense tasks instead of the classifier.
        out_indices: stages of the pyramid; default: all.
        overrides: keys of the model's configuration, such as ``num_classes``.

    Raises:
        UserError: for an unknown model or argument; the message suggests the nearest one.
    """
    model = build_model(preset(name, **overrides))
    if not features_only:
        if out_indices is not None:
            raise UserError("out_indices: only valid with features_only=True")
        return model
    pyramid = getattr(model, "pyramid", None)
    if pyramid is None:
        raise UserError(f"features_only: model '{name}' has no pyramid of feature maps")
    return cast(nn.Module, pyramid(out_indices))


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model that ``config`` describes, with initial weights from torch's random generator."""
    return cast(nn.Module, MODELS.implementation(config)(config))


def example_inputs(
    config: ModelConfig, *, batch: int = 1, image_size: tuple[int, int] = (224, 224), variates: int = 7
) -> tuple[Tensor | None, ...]:
    """Return example inputs of the model of ``config`` (zeros), as a tuple of positional arguments.

    Args:
        batch: number of samples.
        image_size: height and width of images.
        variates: number of variates of series.

    Raises:
        UserError: for a model that takes neither images nor series.
    """
    if isinstance(config, ImageModelConfig):
        return (torch.zeros(batch, config.in_channels, *image_size),)
    if not isinstance(config, ForecasterConfig):
        raise UserError(f"model '{config.name}': its inputs are unknown, because it takes neither images nor series")
    past, more = torch.zeros(batch, config.lookback, variates), config.auxiliary
    mask = torch.ones_like(past, dtype=torch.bool) if more.mask else None
    static = torch.zeros(batch, variates, more.static) if more.static else None
    known = torch.zeros(batch, more.steps, variates, more.future) if more.future else None
    return past, mask, static, known
