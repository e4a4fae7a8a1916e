"""Initial weights of models.

``initialise`` uses torch's generator, for models created in plain Python. The trainer uses ``initial_weights``: the
weights of a module depend only on the seed and the name of the module. They depend neither on the order of creation nor
on the rank, so every strategy starts from the same weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn


def reset_module(module: nn.Module, linear_std: float | None = None) -> None:
    """Initialise the parameters of ``module`` with torch's generator.

    Args:
        linear_std: standard deviation of a truncated normal distribution for the weights of linear layers, whose biases
            are then 0, as in timm's hierarchical models. None: torch's default initialisation.
    """
    if isinstance(module, nn.Linear) and linear_std is not None:
        nn.init.trunc_normal_(module.weight, std=linear_std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        module.reset_parameters()  # type: ignore[operator]


def initialise(model: nn.Module, linear_std: float | None = None) -> None:
    """Apply :func:`reset_module` to every module of ``model`` in order. On the meta device it does nothing."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for _, module in _owners(model):
        reset_module(module, linear_std)


def initial_weights(meta_model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and initial values (on the CPU) of the parameters of ``meta_model``, module by module.

    Only one module is in memory at a time.

    Args:
        meta_model: a model on the meta device. If its class has a method ``reset_module(module)``, this initialises the
            modules, else :func:`reset_module`.
        seed: seed of the run.
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
    """Yield the names and outermost modules that have ``reset_parameters``. Together they own all parameters."""
    if hasattr(model, "reset_parameters"):
        yield prefix, model
        return
    without = [name for name, _ in model.named_parameters(recurse=False)]
    if without:
        raise TypeError(
            f"{type(model).__name__} has the parameters {', '.join(without)}, but no method reset_parameters:"
            " add one that initialises them"
        )
    for name, child in cast(dict[str, nn.Module], model._modules).items():
        if child is not None:
            yield from _owners(child, f"{prefix}.{name}" if prefix else name)
