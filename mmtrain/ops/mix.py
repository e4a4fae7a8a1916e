"""``selective_mix``, the inner part of a mixer from its convolution to its gate, for all scan directions at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend
from mmtrain.ops.arguments import NAMES, ORDERS, check_floats, check_orders, check_shape, wants_gradients
from mmtrain.ops.conv import causal_conv1d
from mmtrain.ops.cpu.operators import selective_mix_fwd
from mmtrain.ops.scan import selective_scan

OP = "selective_mix"


class Direction(NamedTuple):
    """The parameters and the order of one selective scan. R is the rank of Δ, N the state size.

    Attributes:
        x_proj: (R + 2N, D) projects the input to the low-rank form r of Δ, to B and to C.
        dt_proj: (D, R); Δ = softplus(dt_proj r + dt_bias).
        dt_bias: (D,).
        A: (D, N).
        D: (D,) weight of the direct path.
        order: one of :data:`mmtrain.ops.arguments.NAMES`.
        conv: (D, K) weights of a causal convolution with SiLU along that order, before the scan; None: no convolution.
        conv_bias: (D,).
    """

    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    order: str = "rows"
    conv: Tensor | None = None
    conv_bias: Tensor | None = None

    @property
    def code(self) -> int:
        """The code of the order in the kernels."""
        return NAMES.index(self.order)


#: A function that every :func:`selective_mix` calls with (x, directions, height).
Observer = Callable[[Tensor, Sequence[Direction], int], None]
_observers: list[Observer] = []


@contextmanager
def observed(callback: Observer) -> Iterator[None]:
    """Call ``callback`` with the arguments of every :func:`selective_mix` in the ``with`` block, in all threads."""
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def _check(x: Tensor, directions: Sequence[Direction], gated: bool, height: int) -> None:
    check_floats(OP, "x", {"x": x})
    if x.dim() not in (3, 4) or 0 in x.shape[-2:]:
        raise UserError(f"{OP}: x has shape {tuple(x.shape)}, expected (batch, [inner batch,] positions, channels)")
    length, channels = x.shape[-2:]
    if gated and channels % 2:
        raise UserError(f"{OP}: x has {channels} channels; with a gate the number must be even")
    channels //= 2 if gated else 1
    if height < 1 or length % height:
        raise UserError(f"{OP}: height={height} must be at least 1 and divide the {length} positions of x")
    check_orders(OP, [direction.order for direction in directions])
    for i, d in enumerate(directions):
        named = {name: value for name, value in d._asdict().items() if name != "order"}
        where = f"directions[{i}]."
        optional = (where + "conv", where + "conv_bias")
        check_floats(OP, "x", {"x": x} | {where + name: t for name, t in named.items()}, optional)
        if d.A.dim() != 2 or d.A.shape[0] != channels or d.A.shape[1] == 0:
            raise UserError(f"{OP}: {where}A has shape {tuple(d.A.shape)}, expected (D, N) with D = {channels}")
        if d.dt_proj.dim() != 2 or d.dt_proj.shape[0] != channels or d.dt_proj.shape[1] == 0:
            raise UserError(f"{OP}: {where}dt_proj has shape {tuple(d.dt_proj.shape)}, expected (D, R), D = {channels}")
        check_shape(OP, where + "x_proj", d.x_proj, (d.dt_proj.shape[1] + 2 * d.A.shape[1], channels), "(R + 2N, D)")
        for name in ("dt_bias", "D", "conv_bias"):
            if named[name] is not None:
                check_shape(OP, where + name, named[name], (channels,), "(D,)")
        if d.conv is not None and (d.conv.dim() != 2 or d.conv.shape[0] != channels or d.conv.shape[1] == 0):
            raise UserError(f"{OP}: {where}conv has shape {tuple(d.conv.shape)}, expected (D, K) with D = {channels}")


def selective_mix(x: Tensor, directions: Sequence[Direction], gated: bool = False, height: int = 1) -> Tensor:
    """Return SiLU(z) · mean_k S6_k(SiLU(Conv_k(x))) over the directions k (paper, "The MambaMixer block").

    On the CPU a single C++ operator computes it. For the backward pass it saves only x, z and the states of the scans
    at every 64th position; convolutions, projections and gates are recomputed. On other devices it is a composition of
    ``causal_conv1d``, matrix products and ``selective_scan``.

    Args:
        x: (Bt, L, D) or (Bt, Inner, L, D), any strides. Positions are numbered row by row in a grid of ``height`` rows.
            To scan along another axis of a tensor, pass a transposed view; it is not copied.
        directions: at least one.
        gated: x has 2D channels; the second half is the gate z.
        height: number of rows of the grid; 1 for a sequence.

    Returns:
        (..., L, D) with the dtype and memory layout of x.

    Raises:
        UserError: if a shape, dtype or device does not fit (the message names the argument), or if the requested
            backend cannot run.
    """
    _check(x, directions, gated, height)
    for callback in _observers:
        callback(x.chunk(2, -1)[0] if gated else x, directions, height)
    if fits_one_operator(x, directions):
        return _fused(x, directions, gated, height)
    return compose(x, directions, gated, height)


def fits_one_operator(x: Tensor, directions: Sequence[Direction]) -> bool:
    """Return whether the C++ operator applies: cpu backend, tensors on the CPU, and directions of equal sizes."""
    return (
        _equal(directions)
        and x.device.type == "cpu"
        and backend.fusing()
        and backend.choose("cpu", x.dtype == torch.float64) == "cpu"
    )


def _equal(directions: Sequence[Direction]) -> bool:
    first = directions[0]
    return all(
        d.A.shape == first.A.shape
        and d.dt_proj.shape == first.dt_proj.shape
        and (None if d.conv is None else d.conv.shape) == (None if first.conv is None else first.conv.shape)
        and (d.conv_bias is None) == (first.conv_bias is None)
        for d in directions
    )


def _fused(x: Tensor, directions: Sequence[Direction], gated: bool, height: int) -> Tensor:
    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(d, name) for d in directions]
        if tensors[0] is None:
            return None
        return (tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)).float()

    x4 = x if x.dim() == 4 else x[:, None]
    x4 = x4 if x.dtype in backend.CPU_DTYPES else x4.float()
    parameters = [stacked(name) for name in ("conv", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")]
    settings = ([d.code for d in directions], height, 1 / len(directions), gated)
    with torch.autocast("cpu", enabled=False):
        out, _ = selective_mix_fwd(x4, *parameters, *settings, wants_gradients(x4, *parameters))
    return (out if x.dim() == 4 else out[:, 0]).to(x.dtype)


def compose(x: Tensor, directions: Sequence[Direction], gated: bool, height: int) -> Tensor:
    """Compute :func:`selective_mix` as a composition of several operators."""
    if x.dim() == 4:
        return compose(x.flatten(0, 1), directions, gated, height).unflatten(0, x.shape[:2])
    if gated:
        x, z = x.chunk(2, -1)
    mean = _by_grid(x, directions, height) if _one_launch(x, directions) else _by_axis(x, directions, height)
    return mean * F.silu(z) if gated else mean


def _one_launch(x: Tensor, directions: Sequence[Direction]) -> bool:
    """Return whether one Triton launch can scan all directions: equal sizes, and convolutions only along rows."""
    return (
        x.device.type != "meta"
        and backend.choose(x.device.type, x.dtype == torch.float64) in backend.GPU_BACKENDS
        and backend.has_triton()
        and _equal(directions)
        and all(d.conv is None or ORDERS[d.code].axis == "rows" for d in directions)
    )


def _by_grid(x: Tensor, directions: Sequence[Direction], height: int) -> Tensor:
    """Return the mean over all directions, computed by one launch without permuting the grid."""
    from mmtrain.ops.triton.api import directional_scan_triton

    batch, length, channels = x.shape
    first = directions[0]
    rank, state = first.dt_proj.shape[1], first.A.shape[1]
    if first.conv is None:
        u = x[:, None]
        weight = torch.cat([d.x_proj for d in directions])
        rows = F.linear(x, weight).unflatten(-1, (len(directions), -1)).permute(2, 0, 1, 3)
    else:
        each = [convolved(x, d) for d in directions]
        u = torch.stack(each, 1)
        rows = torch.stack([F.linear(v, d.x_proj) for v, d in zip(each, directions, strict=True)])
    low, b, c = rows.split([rank, state, state], -1)  # each (K, Bt, L, ·)
    projections = torch.stack([d.dt_proj.T for d in directions]).to(low.dtype)
    delta = torch.bmm(low.reshape(len(directions), -1, rank), projections).view(-1, batch, length, channels)
    stacked = [torch.stack([getattr(d, name) for d in directions]).float() for name in ("A", "D", "dt_bias")]
    orders = [d.code for d in directions]
    out = directional_scan_triton(
        u.transpose(2, 3),
        delta.permute(1, 0, 3, 2),
        stacked[0],
        b.permute(1, 0, 3, 2),
        c.permute(1, 0, 3, 2),
        stacked[1],
        stacked[2],
        True,
        height,
        length // height,
        orders,
    )
    mean = out.transpose(1, 2)
    return mean / len(directions) if len(directions) > 1 else mean


def _by_axis(x: Tensor, directions: Sequence[Direction], height: int) -> Tensor:
    """Return the mean over all directions, with one scan for each. Column orders use a transposed copy of x."""
    batch, length, channels = x.shape
    width = length // height
    by_axis: dict[str, Tensor] = {}
    for d in directions:
        order = ORDERS[d.code]
        u = x
        if order.axis == "columns":
            u = x.reshape(batch, height, width, channels).transpose(1, 2).reshape(batch, length, channels)
        y, _ = scan_one(convolved(u, d), d)
        by_axis[order.axis] = by_axis[order.axis] + y if order.axis in by_axis else y
    total = by_axis.get("rows")
    if "columns" in by_axis:
        turned = by_axis["columns"].view(batch, width, height, channels).transpose(1, 2).reshape(x.shape)
        total = turned if total is None else total + turned
    assert total is not None
    return total / len(directions) if len(directions) > 1 else total


def convolved(u: Tensor, d: Direction) -> Tensor:
    """Return the input of the scan of ``d``: SiLU(Conv(u)), or u (Bt, L, D) if it has no convolution."""
    if d.conv is None:
        return u
    reverse = ORDERS[d.code].reverse
    return causal_conv1d(u.transpose(1, 2), d.conv, d.conv_bias, activation="silu", reverse=reverse).transpose(1, 2)


def scan_one(u: Tensor, d: Direction) -> tuple[Tensor, Tensor]:
    """Run the scan of one direction.

    Args:
        u: (Bt, L, D) after the convolution, with positions in the order of ``d`` or its reverse.

    Returns:
        y (Bt, L, D) and the last state (Bt, D, N).
    """
    rank, state = d.dt_proj.shape[1], d.A.shape[1]
    low_rank, b, c = F.linear(u, d.x_proj).split([rank, state, state], dim=-1)
    y, last = selective_scan(
        u.transpose(1, 2),
        F.linear(low_rank, d.dt_proj).transpose(1, 2),
        d.A,
        b.transpose(1, 2),
        c.transpose(1, 2),
        d.D,
        delta_bias=d.dt_bias,
        delta_softplus=True,
        reverse=ORDERS[d.code].reverse,
        return_last_state=True,
    )
    return y.transpose(1, 2), last
