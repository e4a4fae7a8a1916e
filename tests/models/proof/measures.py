"""What several proofs need: errors relative to a tensor's scale, gradients by name, and the scripts of benchmarks."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

_BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def scaled_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest element of ``expected``, or over ``floor`` if that is larger."""
    scale = max(expected.abs().max().item(), floor)
    return (found.double() - expected.double()).abs().max().item() / max(scale, 1e-30)


def norm_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, for noise (of low precision) rather than mistakes."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def total_norm(tensors: dict[str, Tensor]) -> float:
    """‖all the gradients together‖ (everything but "out")."""
    return math.sqrt(sum(t.double().square().sum().item() for name, t in tensors.items() if name != "out"))


def gradients(module: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """``module(x)`` as "out", and the gradients of Σ weight·out with respect to "x" and every parameter."""
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf)
    named = dict(module.named_parameters())
    found = torch.autograd.grad((out * weight).sum(), [leaf, *named.values()])
    return {"out": out.detach(), **dict(zip(["x", *named], found, strict=True))}


def benchmark(name: str) -> ModuleType:
    """The script ``benchmarks/<name>.py`` as a module: the proofs check the very figures that it prints."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", _BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
