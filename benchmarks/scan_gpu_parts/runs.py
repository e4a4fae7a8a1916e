"""Implementations of the directional scan to be compared, and their float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.ops import upstream
from mmtrain.ops.arguments import ScanInputs
from mmtrain.ops.triton.api import directional_scan_triton, selective_scan_triton
from scan_gpu_parts.shapes import Inputs, Shape, walk

Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Candidate:
    """An implementation of the scan.

    Attributes:
        run: Runs the scan.
        prepare: Brings the inputs into the layout in which a model would compute them. This is not timed.
        walked: Whether delta, B and C are in the order of the scan, and not in that of the grid.
    """

    run: Run
    prepare: Callable[[Inputs], Inputs]
    walked: bool


def ours(shape: Shape) -> Candidate:
    """Return mmtrain's kernel, which scans in all directions in one launch."""

    def run(t: Inputs) -> Tensor:
        grid = (shape.height, shape.width, shape.orders)
        rest = (t[n] for n in ("delta", "A", "B", "C", "D", "delta_bias"))
        return directional_scan_triton(t["u"], *rest, True, *grid)

    return Candidate(run, lambda t: t, walked=False)


def composed(shape: Shape, scan: Callable[..., tuple[Tensor, Tensor]], channels_last: bool) -> Candidate:
    """Return the composition: copies of u in every order, one scan with one group per copy, and the sum of the results.

    delta, B and C are given in the order of the scan, as a model would compute them, and in the layout that the kernel
    reads: channels-last, or with adjacent positions.
    """
    d = shape.channels

    def along(tensor: Tensor) -> Tensor:
        return tensor if channels_last else tensor.contiguous()

    def prepare(t: Inputs) -> Inputs:
        delta = t["delta"].detach().permute(0, 3, 1, 2).flatten(2).transpose(1, 2)  # (Bt, K·D, L), channels-last
        changed = {"delta": along(delta)} | {n: along(t[n].detach()) for n in "BC"}
        return {n: changed.get(n, v.detach()).requires_grad_() for n, v in t.items()}

    def run(t: Inputs) -> Tensor:
        batch, length = shape.batch, shape.length
        image = t["u"][:, 0].transpose(1, 2).unflatten(1, (shape.height, shape.width))
        copies = []
        for order in shape.orders:
            turned = image.transpose(1, 2) if order >= 2 else image
            flat = turned.reshape(batch, length, d)
            copies.append(flat.flip(1) if order % 2 else flat)
        u = along(torch.cat(copies, 2).transpose(1, 2))
        rest = (t["A"].flatten(0, 1), t["B"], t["C"], t["D"].flatten(), None, t["delta_bias"].flatten())
        y, _ = scan(ScanInputs(u, t["delta"], *rest, delta_softplus=True))
        total = torch.zeros(batch, d, length, device=u.device)
        for i, order in enumerate(shape.orders):
            part = y[:, i * d : (i + 1) * d]
            part = part.flip(-1) if order % 2 else part
            if order >= 2:
                part = part.unflatten(-1, (shape.width, shape.height)).transpose(-1, -2).flatten(-2)
            total = total + part
        return total.to(u.dtype)

    return Candidate(run, prepare, walked=True)


def candidates(shape: Shape) -> dict[str, Candidate]:
    """Return the implementations that can run on this machine, by name."""
    found = {"ours": ours(shape), "copies + our 1-D scan": composed(shape, selective_scan_triton, True)}
    if upstream.available()[0]:
        found["copies + mamba-ssm"] = composed(shape, upstream.selective_scan_upstream, False)
    return found


def definition(shape: Shape, t: Inputs, walked: bool) -> Tensor:
    """Compute the scan position by position, in the dtype of ``t``. ``walked`` is that of :class:`Candidate`."""
    total = torch.zeros_like(t["delta"][:, 0])
    for k, order in enumerate(shape.orders):
        places = walk(order, shape, total.device)
        u = t["u"][:, 0][..., places]
        delta, B, C = (t[n][:, k] if walked else t[n][:, k][..., places] for n in ("delta", "B", "C"))
        step = F.softplus(delta + t["delta_bias"][k][:, None])
        h = torch.zeros(*u.shape[:2], shape.state, dtype=u.dtype, device=u.device)
        y = []
        for i in range(shape.length):
            at = step[:, :, i, None]
            h = torch.exp(at * t["A"][k]) * h + at * u[:, :, i, None] * B[:, None, :, i]
            y.append((h * C[:, None, :, i]).sum(-1))
        back = torch.empty_like(places)
        back[places] = torch.arange(shape.length, device=places.device)
        total = total + (torch.stack(y, -1) + t["D"][k][:, None] * u)[..., back]
    return total


def errors(shape: Shape, t: Inputs) -> dict[str, tuple[float, float]]:
    """Return the largest errors of output and gradients of every candidate, relative to the largest element."""
    doubles = {n: v.detach().double().requires_grad_() for n, v in t.items()}
    start = torch.randn(shape.batch, shape.channels, shape.length, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, candidate in candidates(shape).items():
        exact = definition(shape, doubles, candidate.walked)
        exact_grads = torch.autograd.grad(exact, list(doubles.values()), start.to(exact))
        prepared = candidate.prepare(t)
        out = candidate.run(prepared)
        grads = dict(zip(prepared, torch.autograd.grad(out, list(prepared.values()), start.to(out)), strict=True))
        if candidate.walked:
            grads["delta"] = grads["delta"].unflatten(1, (len(shape.orders), shape.channels))
        off = [_error(grads[n], exact_grad) for n, exact_grad in zip(doubles, exact_grads, strict=True)]
        found[name] = _error(out.detach(), exact.detach()), max(off)
    return found


def _error(value: Tensor, exact: Tensor) -> float:
    if not value.isfinite().all():
        return float("inf")
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()
