"""Models by name."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from mmtrain.config import MODELS, ModelConfig, TSM2Config, ViM2Config
from mmtrain.config.models import preset
from mmtrain.models.tsm2 import TSM2
from mmtrain.models.vim2 import ViM2


def list_models(pattern: str = "*") -> list[str]:
    """The names that :func:`create_model` knows, filtered by a shell pattern such as ``vim2*``."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern)]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the model called ``name``, with arguments of its configuration overridden.

    Example: ``create_model("vim2_small", num_classes=10)``.

    Raises:
        UserError: for an unknown name or argument, with the nearest one.
    """
    return build_model(preset(name, **overrides))


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model that ``config`` describes, with fresh weights from torch's generator."""
    if isinstance(config, ViM2Config):
        return ViM2(config)
    if isinstance(config, TSM2Config):
        return TSM2(config)
    raise TypeError(f"no model is registered for {type(config).__name__}")
