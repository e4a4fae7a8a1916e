"""The C++ selective scan as torch custom operators: eager, torch.compile, fake tensors, autograd, FLOP counts.

``mmtrain::selective_scan_fwd`` returns the output and the states at every 64th position (shape
(Bt, ceil(L/64) - 1, N, G·pad16(D/G)), empty when not asked for); ``mmtrain::selective_scan_bwd`` recomputes the rest.
All tensors float32; B and C (Bt, G, N, L); any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops import library
from mmtrain.ops.library import CHANNEL_PAD, CHUNK, ScanArgs, View3, View4


def _states_shape(u: Tensor, B: Tensor, save_states: bool) -> tuple[int, int, int, int]:
    groups = B.shape[1]
    padded = (u.shape[1] // groups + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    boundaries = (u.shape[2] - 1) // CHUNK if save_states else 0
    return u.shape[0], boundaries, B.shape[2], groups * padded


def _pointer(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def _scan_args(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> ScanArgs:
    return ScanArgs(
        batch=u.shape[0],
        dim=u.shape[1],
        length=u.shape[2],
        state=A.shape[1],
        groups=B.shape[1],
        softplus=delta_softplus,
        reverse=reverse,
        u=View3.of(u),
        delta=View3.of(delta),
        A=_pointer(A),
        B=View4.of(B),
        C=View4.of(C),
        D=_pointer(D),
        bias=_pointer(delta_bias),
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("mmtrain::selective_scan_fwd", mutates_args=(), device_types="cpu")
def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """(out, states); see the module's head."""
    out = torch.empty_like(u)
    states = u.new_empty(_states_shape(u, B, save_states))
    if u.numel():
        A, D, delta_bias = A.contiguous(), _dense(D), _dense(delta_bias)
        args = _scan_args(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        args.out, args.states = View3.of(out), _pointer(states)
        library.loaded().call("scan_forward", args)
    return out, states


@selective_scan_fwd.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(_states_shape(u, B, save_states))


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> Gradients:
    """In the layout of what they are gradients of; those of absent parameters have no elements."""
    dA = A.new_empty(A.shape)
    dD, dbias = (u.new_empty(0) if p is None else p.new_empty(p.shape) for p in (D, delta_bias))
    return torch.empty_like(u), torch.empty_like(delta), dA, torch.empty_like(B), torch.empty_like(C), dD, dbias


@torch.library.custom_op("mmtrain::selective_scan_bwd", mutates_args=(), device_types="cpu")
def selective_scan_bwd(
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
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddelta, dA, dB, dC, dD, ddelta_bias); bit for bit the same for any number of threads."""
    grads = _empty_gradients(u, delta, A, B, C, D, delta_bias)
    if not u.numel():
        for grad in grads:
            grad.zero_()
        return grads
    A, D, delta_bias = A.contiguous(), _dense(D), _dense(delta_bias)
    args = _scan_args(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    if not states.numel() and u.shape[2] > CHUNK:  # the forward ran without gradients in mind: its states once more
        states = u.new_empty(_states_shape(u, B, True))
        args.states = _pointer(states)
        library.loaded().call("scan_forward", args)
    args.states = _pointer(states)
    du, ddelta, dA, dB, dC, dD, dbias = grads
    args.dout, args.du, args.ddelta = View3.of(dout), View3.of(du), View3.of(ddelta)
    args.dA, args.dD, args.dbias = _pointer(dA), _pointer(dD), _pointer(dbias)
    args.dB, args.dC = View4.of(dB), View4.of(dC)
    library.loaded().call("scan_backward", args)
    return grads


@selective_scan_bwd.register_fake
def _(
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
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(u, delta, A, B, C, D, delta_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
    _, states = output
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dbias = selective_scan_bwd(
        dout, u, delta, A, B, C, D, delta_bias, states, ctx.delta_softplus, ctx.reverse
    )
    parameters = (None if D is None else dD, None if delta_bias is None else dbias)
    return du, ddelta, dA, dB, dC, *parameters, None, None, None


selective_scan_fwd.register_autograd(_backward, setup_context=_setup_context)


def scan_flops(u_shape: torch.Size, A_shape: torch.Size) -> int:
    """Floating-point operations of one forward scan: 9·Bt·L·D·N + Bt·L·D (the count customary for Mamba)."""
    batch, channels, length = u_shape
    return batch * length * channels * (9 * A_shape[1] + 1)


@register_flop_formula(torch.ops.mmtrain.selective_scan_fwd)
def _forward_flops(u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any) -> int:
    return scan_flops(u, A)


@register_flop_formula(torch.ops.mmtrain.selective_scan_bwd)
def _backward_flops(
    dout: torch.Size, u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return 2 * scan_flops(u, A)
