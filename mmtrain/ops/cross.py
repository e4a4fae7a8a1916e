"""``cross_selective_scan``: a grid scanned in several orders at once, and the results added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend, gpu
from mmtrain.ops.checks import check_floats, check_shape
from mmtrain.ops.cpu.cross import cross_scan_fwd
from mmtrain.ops.orders import NAMES, ORDERS, codes
from mmtrain.ops.scan import selective_scan

OP = "cross_selective_scan"


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    count: int,
) -> None:
    check_floats(OP, "u", {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias})
    if u.dim() != 4 or 0 in u.shape[1:]:
        raise UserError(f"{OP}: u has shape {tuple(u.shape)}, expected (batch, channels, height, width)")
    batch, channels, height, width = u.shape
    check_shape(OP, "delta", delta, (batch, count, channels, height, width), "(batch, directions, channels, H, W)")
    if A.dim() != 3 or A.shape[:2] != (count, channels) or A.shape[2] == 0:
        raise UserError(f"{OP}: A has shape {tuple(A.shape)}, expected (K, D, N) with K = {count} and D = {channels}")
    for name, tensor in (("B", B), ("C", C)):
        check_shape(OP, name, tensor, (batch, count, A.shape[2], height, width), "(batch, directions, N, H, W)")
    for name, optional in (("D", D), ("delta_bias", delta_bias)):
        if optional is not None:
            check_shape(OP, name, optional, (count, channels), "(directions, channels)")


def cross_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    orders: Sequence[str] = NAMES,
) -> Tensor:
    """Σ_k of ``selective_scan`` over the grid u, each direction k in its own order (VMamba, arXiv 2401.10166).

    Nothing of the size of u is permuted: every direction finds its positions by index arithmetic.

    Args:
        u: (Bt, D, H, W): float32, bfloat16, float16 or float64, in any layout (channels-last is the fastest).
        delta: (Bt, K, D, H, W), by place in the grid, as B and C.
        A: (K, D, N).
        B, C: (Bt, K, N, H, W).
        D, delta_bias: (K, D).
        delta_softplus: whether Δ passes through softplus.
        orders: K names of :data:`mmtrain.ops.orders.NAMES`; all four of them by default.

    Returns:
        (Bt, D, H, W), dtype and memory layout of u. State and sums are float32 (float64 if the input is).

    Raises:
        UserError: shapes, dtypes, devices or orders that do not fit, naming the argument; a backend that cannot run.
    """
    numbers = codes(OP, orders)
    _check(u, delta, A, B, C, D, delta_bias, len(numbers))
    float64 = u.dtype == torch.float64
    compute = torch.float64 if float64 else torch.float32
    skip, bias = (None if t is None else t.to(compute) for t in (D, delta_bias))
    chosen = backend.choose(u.device.type, float64)
    if chosen in gpu.BACKENDS and backend.has_triton():
        from mmtrain.ops.triton.api import directional_scan_triton

        places = [t.flatten(-2) for t in (u[:, None], delta, B, C)]
        sizes = (u.shape[2], u.shape[3], numbers)
        out = directional_scan_triton(
            places[0], places[1], A, places[2], places[3], D, delta_bias, delta_softplus, *sizes
        )
        return out.unflatten(-1, u.shape[2:])
    if chosen == "cpu":
        flat = [t.to(compute).flatten(-2) for t in (u, delta, B, C)]
        tensors = (flat[0], flat[1], A.to(compute), flat[2], flat[3], skip, bias)
        wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        out, _ = cross_scan_fwd(*tensors, delta_softplus, list(numbers), u.shape[2], wants_grad)
        return out.unflatten(-1, u.shape[2:]).to(u.dtype)
    height, width = u.shape[2:]
    total: Tensor | None = None
    for k, number in enumerate(numbers):
        order = ORDERS[number]
        grids = [u, delta[:, k], B[:, k], C[:, k]]
        turned = [(t.transpose(-1, -2) if order.axis == "columns" else t).flatten(-2) for t in grids]
        y = selective_scan(
            turned[0],
            turned[1],
            A[k],
            turned[2],
            turned[3],
            None if skip is None else skip[k],
            delta_bias=None if bias is None else bias[k],
            delta_softplus=delta_softplus,
            reverse=order.reverse,
        )
        by_column = order.axis == "columns"
        grid = y.unflatten(-1, (width, height) if by_column else (height, width))
        grid = grid.transpose(-1, -2) if by_column else grid
        total = grid.to(compute) if total is None else total + grid
    assert total is not None
    return torch.empty_like(u).copy_(total)
