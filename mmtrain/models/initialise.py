"""Initial weights: in place for a model of one's own, or as a pure function of a seed for the trainer.

The trainer's weights depend on (seed, name of the module) alone, neither on the order in which modules are made nor on
the rank that holds them. So every strategy of sharding starts from the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn


def reset_module(module: nn.Module, linear_std: float | None = None) -> None:
    """Give the parameters of ``module`` their initial values, from torch's generator.

    Args:
        linear_std: linear maps come from a truncated normal of this deviation, with biases of 0, as in timm's
            hierarchical models; None leaves them torch's own initialisation.
    """
    if isinstance(module, nn.Linear) and linear_std is not None:
        nn.init.trunc_normal_(module.weight, std=linear_std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        module.reset_parameters()  # type: ignore[operator]


def initialise(model: nn.Module, linear_std: float | None = None) -> None:
    """:func:`reset_module` for every part of ``model``, in order; not on the meta device, where there are no values."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for _, module in _owners(model):
        reset_module(module, linear_std)


def initial_weights(meta_model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and initial values (CPU) of the parameters of ``meta_model``, module by module.

    ``meta_model`` is on the meta device and stays there: no more than one module is in memory at a time. Its class may
    have a ``reset_module(module)`` that is used instead of ``module.reset_parameters()``.
    """
    reset = getattr(meta_model, "reset_module", reset_module)
    for name, module in _owners(meta_model):
        module.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            reset(module)
        prefix = f"{name}." if name else ""
        for key, parameter in module.named_parameters():
            yield prefix + key, parameter.detach()
        module.to("meta")


def _owners(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that know how to reset all parameters below them, with their names."""
    if hasattr(model, "reset_parameters"):
        yield prefix, model
        return
    lost = [name for name, _ in model.named_parameters(recurse=False)]
    if lost:
        raise TypeError(f"{type(model).__name__} has {', '.join(lost)} and no reset_parameters to initialise them")
    for name, child in cast(dict[str, nn.Module], model._modules).items():
        if child is not None:
            yield from _owners(child, f"{prefix}.{name}" if prefix else name)
