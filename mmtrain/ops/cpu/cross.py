"""The C++ scan over a grid in several orders, as torch custom operators ``mmtrain::cross_scan_fwd`` and ``_bwd``.

u (Bt, D, L) with L = height · width, delta (Bt, K, D, L), A (K, D, N), B and C (Bt, K, N, L), D and delta_bias (K, D);
float32, any strides. Positions are those of the grid, row by row: each direction finds its own by a table, and only B
and C, which are small, are copied into the order of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import CHANNEL_PAD, CHUNK, ScanArgs, View3, View4
from mmtrain.ops.cpu.scan import scan_flops
from mmtrain.ops.orders import ORDERS, positions


def _states_shape(u: Tensor, A: Tensor, save_states: bool) -> tuple[int, ...]:
    padded = (u.shape[1] + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    return A.shape[0], u.shape[0], (u.shape[2] - 1) // CHUNK if save_states else 0, A.shape[2], padded


class _Direction:
    """The arguments of one direction's scan, and the tensors that they point to."""

    def __init__(self, k: int, code: int, height: int, softplus: bool, tensors: tuple[Tensor | None, ...]) -> None:
        u, delta, A, B, C, D, bias = tensors
        assert u is not None
        assert delta is not None
        assert A is not None
        assert B is not None
        assert C is not None
        self.by_column = ORDERS[code].axis == "columns"
        self.table = positions((code,), height, u.shape[2] // height)[0]
        self.B, self.C = (t[:, k, :, self.table] if self.by_column else t[:, k] for t in (B, C))
        self.parameters = [None if t is None else t[k].contiguous() for t in (A, D, bias)]
        A_k, D_k, bias_k = self.parameters
        assert A_k is not None
        self.args = ScanArgs(
            batch=u.shape[0],
            dim=u.shape[1],
            length=u.shape[2],
            state=A.shape[2],
            groups=1,
            softplus=softplus,
            reverse=ORDERS[code].reverse and not self.by_column,
            accumulate=k > 0,
            order=self.table.data_ptr() if self.by_column else None,
            u=View3.of(u),
            delta=View3.of(delta[:, k]),
            A=A_k.data_ptr(),
            B=View4.of(self.B[:, None]),
            C=View4.of(self.C[:, None]),
            D=None if D_k is None else D_k.data_ptr(),
            bias=None if bias_k is None else bias_k.data_ptr(),
        )


@torch.library.custom_op("mmtrain::cross_scan_fwd", mutates_args=(), device_types="cpu")
def cross_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: list[int],
    height: int,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """(the sum of the directions (Bt, D, L) in the layout of u, states)."""
    out = torch.empty_like(u)
    states = u.new_empty(_states_shape(u, A, save_states))
    if u.numel():
        for k, code in enumerate(orders):
            direction = _Direction(k, code, height, delta_softplus, (u, delta, A, B, C, D, delta_bias))
            direction.args.out = View3.of(out)
            direction.args.states = states[k].data_ptr() if states.numel() else None
            library.loaded().call("scan_forward", direction.args)
    return out, states


@cross_scan_fwd.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(_states_shape(u, A, save_states=rest[-1]))


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(u: Tensor, delta: Tensor, *parameters: Tensor | None) -> Gradients:
    """In the layout of u and delta, the others dense; of what is absent, without elements."""
    made = [u.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters]
    return torch.empty_like(u), torch.empty_like(delta), *made  # type: ignore[return-value]


@torch.library.custom_op("mmtrain::cross_scan_bwd", mutates_args=(), device_types="cpu")
def cross_scan_bwd(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    orders: list[int],
    height: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddelta, dA, dB, dC, dD, ddelta_bias)."""
    du, ddelta, dA, dB, dC, dD, dbias = grads = _empty_gradients(u, delta, A, B, C, D, delta_bias)
    if not u.numel():
        for grad in grads:
            grad.zero_()
        return grads
    if not states.numel() and u.shape[2] > CHUNK:  # the forward ran without gradients in mind: its states once more
        _, states = cross_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, True)
    for k, code in enumerate(orders):
        direction = _Direction(k, code, height, delta_softplus, (u, delta, A, B, C, D, delta_bias))
        args = direction.args
        walked = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (direction.B, direction.C)]
        args.states = states[k].data_ptr() if states.numel() else None
        args.dout, args.du, args.ddelta = View3.of(dout), View3.of(du), View3.of(ddelta[:, k])
        args.dA = dA[k].data_ptr()
        args.dB, args.dC = (View4.of(t[:, None]) for t in walked)
        args.dD = None if D is None else dD[k].data_ptr()
        args.dbias = None if delta_bias is None else dbias[k].data_ptr()
        library.loaded().call("scan_backward", args)
        for target, part in zip((dB, dC), walked, strict=True):
            if direction.by_column:
                target[:, k, :, direction.table] = part
            else:
                target[:, k] = part
    return grads


@cross_scan_bwd.register_fake
def _(dout: Tensor, u: Tensor, delta: Tensor, *rest: Any) -> Gradients:
    return _empty_gradients(u, delta, *rest[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.orders, ctx.height, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    grads = cross_scan_bwd(dout, *tensors, states, ctx.delta_softplus, ctx.orders, ctx.height)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None


cross_scan_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mmtrain.cross_scan_fwd)
def _forward_flops(u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any) -> int:
    return A[0] * scan_flops(u, A[1:])


@register_flop_formula(torch.ops.mmtrain.cross_scan_bwd)
def _backward_flops(dout: Any, u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * A[0] * scan_flops(u, A[1:])
