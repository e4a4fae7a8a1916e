"""Inputs for the Triton kernels, a float64 definition of what they compute, and how results are compared."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
ORDERS = (0, 1, 2, 3)


def run_interpreted(file: str) -> None:
    """Run the tests of ``file`` in a process of its own, in which Triton interprets kernels on the CPU.

    Triton decides that when it is imported, and for the whole process: here it would disturb other tests.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@dataclass(frozen=True)
class Case:
    """One directional scan. ``shared``: all directions read one u. ``full``: with D and delta_bias."""

    orders: tuple[int, ...] = ORDERS
    batch: int = 1
    channels: int = 5
    height: int = 3
    width: int = 4
    state: int = 3
    groups: int = 1
    shared: bool = True
    channels_last: bool = True
    softplus: bool = True
    full: bool = True
    gate: bool = False
    initial: bool = False
    dtype: torch.dtype = torch.float32
    shift: float = 0.0  # added to delta: large or tiny steps

    @property
    def length(self) -> int:
        return self.height * self.width


Inputs = dict[str, Tensor]
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z", "initial_state")


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """Leaves of the case's dtype (A: float32), absent ones left out."""
    generator = torch.Generator().manual_seed(1)
    k, d, n, length = len(case.orders), case.channels, case.state, case.length

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def sequence(*shape: int) -> Tensor:
        """(..., features, L)"""
        *outer, features, positions = shape
        if case.channels_last:
            return normal(*outer, positions, features).transpose(-1, -2)
        return normal(*shape)

    delta = sequence(case.batch, k, d, length)
    tensors = {
        "u": sequence(case.batch, 1 if case.shared else k, d, length),
        "delta": (delta if case.softplus else delta.abs() * 0.5) + case.shift,
        "A": -torch.exp(normal(k, d, n)),
        "B": sequence(case.batch, k, case.groups, n, length),
        "C": sequence(case.batch, k, case.groups, n, length),
    }
    if case.full:
        tensors |= {"D": normal(k, d), "delta_bias": normal(k, d) * (1.0 if case.softplus else 0.0)}
    if case.gate:
        tensors["z"] = sequence(case.batch, d, length)
    if case.initial:
        tensors["initial_state"] = normal(case.batch, k, d, n)
    kept = {"A", "initial_state"}
    return {
        name: tensor.to(device, torch.float32 if name in kept else case.dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def walk(order: int, height: int, width: int) -> Tensor:
    """The grid positions in the order in which a direction meets them."""
    grid = torch.arange(height * width).view(height, width)
    places = (grid.T if order >= 2 else grid).reshape(-1)
    return places.flip(0) if order % 2 else places


def define(case: Case, t: Inputs) -> tuple[Tensor, Tensor]:
    """(out, last_state) position by position, in the dtype of the inputs."""
    total = torch.zeros_like(t["delta"][:, 0])
    last: list[Tensor] = []
    for k, order in enumerate(case.orders):
        places = walk(order, case.height, case.width).to(total.device)
        u = t["u"][:, 0 if case.shared else k][..., places]
        delta = t["delta"][:, k][..., places]
        if "delta_bias" in t:
            delta = delta + t["delta_bias"][k][:, None]
        if case.softplus:
            delta = F.softplus(delta)
        B, C = (t[name][:, k].repeat_interleave(case.channels // case.groups, 1)[..., places] for name in "BC")
        h = t["initial_state"][:, k] if case.initial else torch.zeros_like(B[..., 0])
        y: list[Tensor] = []
        for i in range(case.length):
            step = delta[:, :, i, None]
            h = torch.exp(step * t["A"][k]) * h + step * u[:, :, i, None] * B[..., i]
            y.append((h * C[..., i]).sum(-1))
        there = torch.stack(y, -1)
        if "D" in t:
            there = there + t["D"][k][:, None] * u
        back = torch.empty_like(places)
        back[places] = torch.arange(case.length, device=places.device)
        total = total + there[..., back]
        last.append(h)
    if case.gate:
        total = total * F.silu(t["z"])
    return total, torch.stack(last, 1)


def upstream_gradients(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Gradients of out and of last_state to start the backward from."""
    generator = torch.Generator().manual_seed(2)
    out = torch.randn(case.batch, case.channels, case.length, generator=generator)
    last = torch.randn(case.batch, len(case.orders), case.channels, case.state, generator=generator)
    return out.to(device, case.dtype), last.to(device)


def expected(case: Case, tensors: Inputs) -> dict[str, Tensor]:
    """{"out", "last_state", name: gradient}, float64."""
    doubles = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    out, last = define(case, doubles)
    starts = [g.double() for g in upstream_gradients(case, str(out.device))]
    grads = torch.autograd.grad([out, last], list(doubles.values()), starts)
    return {"out": out.detach(), "last_state": last.detach()} | dict(zip(doubles, grads, strict=True))


def found(case: Case, tensors: Inputs) -> dict[str, Tensor]:
    """The same by the Triton operator."""
    from mmtrain.ops.triton.operators import directional_scan_fwd

    arguments = [tensors.get(name) for name in NAMES]
    grid = (case.height, case.width, list(case.orders))
    out, last, _, _ = directional_scan_fwd(*arguments, case.softplus, *grid, True, True)
    starts = upstream_gradients(case, str(out.device))
    grads = torch.autograd.grad([out, last], list(tensors.values()), starts)
    return {"out": out.detach(), "last_state": last.detach()} | dict(zip(tensors, grads, strict=True))


def error(value: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest element."""
    assert value.shape == exact.shape, (value.shape, exact.shape)
    assert value.isfinite().all()
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def assert_close(case: Case, values: dict[str, Tensor], exact: dict[str, Tensor], times: float = 1.0) -> None:
    """float32: outputs to 2e-6, gradients to 2e-5, ``times`` more; narrower dtypes: to a few roundings of theirs."""
    rounding = 0.0 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps
    for name, reference in exact.items():
        allowed = times * (2e-6 if name in ("out", "last_state") else 2e-5) + 2 * rounding
        off = error(values[name], reference)
        assert off <= allowed, f"{name}: {off:.2e} > {allowed:.2e}, {case}"
