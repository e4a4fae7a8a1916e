"""Inputs for the scan tests, an independent float64 definition of the scan, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmtrain.ops import scan_backend, selective_scan
from mmtrain.ops.cpu import library

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    channels: int = 5
    length: int = 11
    state: int = 3
    groups: int = 1
    channels_last: bool = False
    reverse: bool = False
    softplus: bool = True
    full: bool = True  # with D, z, delta_bias
    states: bool = False  # with an initial state, and the last one returned
    seed: int = 0


def inputs(case: Case) -> dict[str, Tensor]:
    """Float32 leaves, those of (Bt, D, L) in the layout asked for."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def sequence() -> Tensor:
        if case.channels_last:
            return normal(case.batch, case.length, case.channels).transpose(1, 2)
        return normal(case.batch, case.channels, case.length)

    tensors = {"u": sequence(), "delta": sequence(), "A": -torch.exp(normal(case.channels, case.state))}
    if not case.softplus:
        tensors["delta"] = tensors["delta"].abs() * 0.5
    for name in "BC":
        if case.groups == 1:  # a slice of a projection, as models make it
            tensors[name] = normal(case.batch, case.length, 2 * case.state)[..., : case.state].transpose(1, 2)
        else:
            tensors[name] = normal(case.batch, case.groups, case.state, case.length)
    if case.full:
        bias = normal(case.channels) * (1.0 if case.softplus else 0.0)
        tensors |= {"D": normal(case.channels), "z": sequence(), "delta_bias": bias}
    if case.states:
        tensors["initial_state"] = normal(case.batch, case.channels, case.state)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run(case: Case, tensors: dict[str, Tensor], grad: Tensor | None = None) -> dict[str, Tensor]:
    """{"out": ..., "last": ..., name: gradient} of ``selective_scan``; "last" only with states."""
    found: dict[str, Tensor] = {}
    if case.states:
        found["out"], found["last"] = selective_scan(
            **tensors, delta_softplus=case.softplus, reverse=case.reverse, return_last_state=True
        )
    else:
        found["out"] = selective_scan(**tensors, delta_softplus=case.softplus, reverse=case.reverse)
    generator = torch.Generator().manual_seed(1)
    grads = {name: torch.randn(value.shape, generator=generator) for name, value in found.items()}
    if grad is not None:
        grads["out"] = grad
    outputs = list(found.values())
    weights = [grads[name].to(value.dtype) for name, value in found.items()]
    return found | dict(zip(tensors, torch.autograd.grad(outputs, list(tensors.values()), weights), strict=True))


def in_float64(case: Case, tensors: dict[str, Tensor], grad: Tensor | None = None) -> dict[str, Tensor]:
    doubles = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    with scan_backend("reference"):
        return run(case, doubles, grad)


def assert_close(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Output to 1e-5, gradients to 1e-4 of the largest element; sums of many terms may cancel (absolute floor)."""
    floor = 1e-6 * (case.batch * case.length * case.channels) ** 0.5
    for name, value in expected.items():
        tolerance = (1e-5 if name in {"out", "last"} else 1e-4) * value.abs().max().item() + floor * 0.1
        error = (found[name].double() - value).abs().max().item()
        assert error <= tolerance, f"{name}: error {error:.3g}, allowed {tolerance:.3g}, {case}"


def available_isas() -> list[str]:
    order = ["baseline", "avx2", "avx512"]
    kernels = library.loaded()
    kernels.set_isa("auto")
    return order[: order.index(kernels.isa) + 1]
