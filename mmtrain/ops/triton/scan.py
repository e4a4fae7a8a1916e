"""The directional scan as torch custom operators: eager, torch.compile, fake tensors, autograd, FLOP counts.

``mmtrain::directional_scan_fwd`` returns (out, last_state, states, total); ``states`` (Bt, K, ceil(L/chunk), D, N) and
``total`` (Bt, L, D: the sum over directions before the gate) are for the backward and empty when not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops.registration import scan_flops
from mmtrain.ops.triton.scan_launch import Problem, Tensors, batch_slices, merge, run_backward, run_forward, ungate
from mmtrain.ops.triton.tuning import minor, returned


def _problem(u: Tensor, B: Tensor, softplus: bool, height: int, width: int, orders: list[int]) -> Problem:
    groups, state = B.shape[2], B.shape[3]
    return Problem(len(orders), groups, u.shape[2] // groups, state, height, width, tuple(orders), softplus)


@torch.library.custom_op("mmtrain::directional_scan_fwd", mutates_args=())
def directional_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    height: int,
    width: int,
    orders: list[int],
    save: bool,
    want_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the module's head, and :mod:`mmtrain.ops.triton.api` for the arguments."""
    problem = _problem(u, B, delta_softplus, height, width, orders)
    batch, directions, dim, length = delta.shape
    out = u.new_empty(batch, length, dim)
    last = u.new_empty(batch, directions, dim, problem.state, dtype=torch.float32) if want_last else None
    states = u.new_empty(_states_shape(problem, batch, save), dtype=torch.float32)
    total = u.new_empty(batch if save and z is not None else 0, length, dim)
    if u.numel():
        ready = Tensors.of(u, delta, A, B, C, D, delta_bias, initial_state)
        z = None if z is None else minor(z)
        direct = directions == 1 and z is None
        # One direction: its result is the sum, in the dtype of u. Several: float32, so that the sum rounds once.
        part_dtype = u.dtype if directions == 1 else torch.float32
        for b in batch_slices(batch, 0 if direct else directions * length * dim * part_dtype.itemsize):
            if direct:
                parts = out[b][:, None]
            elif directions == 1 and save:
                parts = total[b][:, None]
            else:
                parts = u.new_empty(b.stop - b.start, directions, length, dim, dtype=part_dtype)
            run_forward(problem, ready.part(b), parts, states[b] if save else None, None if last is None else last[b])
            if not direct:
                keep = total[b] if save and z is not None and directions > 1 else None
                merge(parts, None if z is None else z[b], keep, out[b])
    elif last is not None:
        last.zero_()
    return (
        returned(out, u),
        u.new_empty(0, dtype=torch.float32) if last is None else last,
        states,
        total,
    )


def _states_shape(problem: Problem, batch: int, save: bool) -> tuple[int, ...]:
    return batch, problem.directions, problem.chunks() if save else 0, problem.dim, problem.state


@directional_scan_fwd.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    height: int,
    width: int,
    orders: list[int],
    save: bool,
    want_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(u, B, delta_softplus, height, width, orders)
    batch, directions, dim, length = delta.shape
    last = u.new_empty(batch, directions, dim, problem.state, dtype=torch.float32)
    return (
        returned(u.new_empty(batch, length, dim), u),
        last if want_last else u.new_empty(0, dtype=torch.float32),
        u.new_empty(_states_shape(problem, batch, save), dtype=torch.float32),
        u.new_empty(batch if save and z is not None else 0, length, dim),
    )


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("mmtrain::directional_scan_bwd", mutates_args=())
def directional_scan_bwd(
    dout: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    total: Tensor,
    delta_softplus: bool,
    height: int,
    width: int,
    orders: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddelta, dA, dB, dC, dD, ddelta_bias, dz, dinitial_state), all but dA's and the parameters' channels-last.

    Those of absent arguments have no elements. The same bits in every run.
    """
    if not u.numel():
        grads = _empty_gradients(u, delta, A, B, C, D, delta_bias, z, initial_state)
        for grad in grads:
            grad.zero_()
        return grads
    if not states.numel() or (z is not None and not total.numel()):  # the forward ran without gradients in mind
        more = (delta_softplus, height, width, orders, True, False)
        _, _, states, total = directional_scan_fwd(u, delta, A, B, C, D, delta_bias, z, initial_state, *more)
    problem = _problem(u, B, delta_softplus, height, width, orders)
    batch, directions, dim, length = delta.shape
    dy, dz = minor(dout), u.new_empty(0)
    if z is not None:
        dtotal, dz = u.new_empty(batch, length, dim, dtype=torch.float32), z.new_empty(batch, length, dim)
        ungate(dy, total, minor(z), dtotal, dz)
        dy, dz = dtotal.transpose(-1, -2), dz.transpose(-1, -2)
    dy = dy[:, None]
    ready = Tensors.of(u, delta, A, B, C, D, delta_bias, initial_state)
    dlast = None if dlast is None else dlast.float().contiguous()
    dinitial = None if ready.initial is None else torch.empty_like(ready.initial)
    shared = u.shape[1] < directions
    du = u.new_empty(batch, u.shape[1], length, dim)
    ddelta = delta.new_empty(batch, directions, length, dim)
    dB, dC = (t.new_empty(*t.shape[:3], length, problem.state) for t in (B, C))
    sums: list[Tensor | None] = []  # gradients of A, D and the bias, added up over the slices of the batch
    # Partial sums of dB and dC for every 32 or more channels, and du of every direction where u is shared.
    bytes_per_entry = directions * length * 4 * (problem.state * dim // 16 + dim * shared)
    for b in batch_slices(batch, bytes_per_entry):
        parts = u.new_empty(b.stop - b.start, directions, length, dim, dtype=torch.float32) if shared else du[b]
        dBC, *found = run_backward(
            problem,
            dy[b],
            ready.part(b),
            states[b],
            None if dlast is None else dlast[b],
            parts,
            ddelta[b],
            None if dinitial is None else dinitial[b],
        )
        if shared:
            merge(parts, None, None, du[b][:, 0])
        dB[b].copy_(dBC[..., 0, :])
        dC[b].copy_(dBC[..., 1, :])
        sums = [None if x is None or y is None else x + y for x, y in zip(sums, found, strict=True)] if sums else found
    dA, dD, dbias, dstart = (
        u.new_empty(0) if t is None or grad is None else grad.to(t.dtype)
        for t, grad in zip((A, D, delta_bias, initial_state), (*sums, dinitial), strict=True)
    )
    return du.mT, ddelta.mT, dA, dB.mT, dC.mT, dD, dbias, dz, dstart


def _empty_gradients(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
) -> Gradients:
    """Channels (of dB, dC: states) adjacent; those of absent arguments have no elements."""

    def swapped(t: Tensor | None) -> Tensor:
        return u.new_empty(0) if t is None else t.new_empty(t.transpose(-1, -2).shape).transpose(-1, -2)

    dD, dbias = (u.new_empty(0) if p is None else p.new_empty(p.shape) for p in (D, delta_bias))
    dA = A.new_empty(A.shape)
    dinitial = u.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return swapped(u), swapped(delta), dA, swapped(B), swapped(C), dD, dbias, swapped(z), dinitial


@directional_scan_bwd.register_fake
def _(dout: Tensor, dlast: Tensor | None, *inputs: Any) -> Gradients:
    return _empty_gradients(*inputs[:9])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, ctx.height, ctx.width, ctx.orders, _, ctx.want_last = inputs
    _, last, states, total = output
    ctx.mark_non_differentiable(states, total, *(() if ctx.want_last else (last,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states, total)


def _backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, states, total = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0][:, 0])
    grads = directional_scan_bwd(
        dout,
        dlast if ctx.want_last else None,
        *tensors,
        states,
        total,
        ctx.delta_softplus,
        ctx.height,
        ctx.width,
        ctx.orders,
    )
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), *([None] * 6)


directional_scan_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mmtrain.directional_scan_fwd)
def _forward_flops(u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any) -> int:
    return scan_flops(delta, A)


@register_flop_formula(torch.ops.mmtrain.directional_scan_bwd)
def _backward_flops(
    dout: torch.Size, dlast: Any, u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return 2 * scan_flops(delta, A)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a forward on these should keep what the backward needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
