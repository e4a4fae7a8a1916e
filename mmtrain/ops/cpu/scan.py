"""The C++ selective scan as torch custom operators: eager, torch.compile, fake tensors, autograd, FLOP counts.

``mmtrain::selective_scan_fwd`` returns the output, the last state (Bt, D, N) and the states at every 64th position
(Bt, ceil(L/64) - 1, N, G·pad16(D/G)), both empty when not asked for; ``mmtrain::selective_scan_bwd`` recomputes the
rest. u and delta are float32 or bfloat16, all others float32; B and C (Bt, G, N, L); any
strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import CHANNEL_PAD, CHUNK, ScanArgs, View3, View4


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


def _empty_outputs(
    u: Tensor, A: Tensor, B: Tensor, save_states: bool, return_last_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    last = A.new_empty(u.shape[0], *A.shape) if return_last_state else A.new_empty(0)
    return torch.empty_like(u), last, A.new_empty(_states_shape(u, B, save_states))


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
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
    return_last_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, states); see the module's head."""
    out, last, states = outputs = _empty_outputs(u, A, B, save_states, return_last_state)
    if u.numel():
        A, D, delta_bias, initial_state = A.contiguous(), _dense(D), _dense(delta_bias), _dense(initial_state)
        args = _scan_args(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        args.initial, args.last = _pointer(initial_state), _pointer(last)
        args.out, args.states = View3.of(out), _pointer(states)
        library.loaded().call("scan_forward", args)
    return outputs


@selective_scan_fwd.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(u, A, B, *rest[-2:])


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Tensor | None) -> Gradients:
    """In the layout of what they are gradients of; those of absent parameters have no elements."""
    dA = A.new_empty(A.shape)
    dD, dbias, dinitial = (u.new_empty(0) if p is None else p.new_empty(p.shape) for p in optional)
    like = torch.empty_like
    return like(u), like(delta), dA, like(B), like(C), dD, dbias, dinitial


@torch.library.custom_op("mmtrain::selective_scan_bwd", mutates_args=(), device_types="cpu")
def selective_scan_bwd(
    dout: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddelta, dA, dB, dC, dD, ddelta_bias, dinitial_state); bit for bit the same for any number of threads.

    ``dlast`` has no elements if there is no gradient of the last state.
    """
    grads = _empty_gradients(u, delta, A, B, C, D, delta_bias, initial_state)
    if not u.numel():
        for grad in grads:
            grad.zero_()
        return grads
    A, D, delta_bias, initial_state = A.contiguous(), _dense(D), _dense(delta_bias), _dense(initial_state)
    dlast = dlast.contiguous()
    args = _scan_args(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    args.initial, args.dlast = _pointer(initial_state), _pointer(dlast)
    if not states.numel() and u.shape[2] > CHUNK:  # the forward ran without gradients in mind: its states once more
        states = A.new_empty(_states_shape(u, B, True))
        args.states = _pointer(states)
        library.loaded().call("scan_forward", args)
    args.states = _pointer(states)
    du, ddelta, dA, dB, dC, dD, dbias, dinitial = grads
    args.dinitial = _pointer(dinitial)
    args.dout, args.du, args.ddelta = View3.of(dout), View3.of(du), View3.of(ddelta)
    args.dA, args.dD, args.dbias = _pointer(dA), _pointer(dD), _pointer(dbias)
    args.dB, args.dC = View4.of(dB), View4.of(dC)
    library.loaded().call("scan_backward", args)
    return grads


@selective_scan_bwd.register_fake
def _(dout: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Gradients:
    return _empty_gradients(u, delta, A, B, C, *rest[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _, _ = inputs
    _, _, states = output
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)


def _backward(ctx: Any, dout: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    grads = selective_scan_bwd(dout, dlast, *tensors, states, ctx.delta_softplus, ctx.reverse)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None


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
    dout: torch.Size, dlast: Any, u: torch.Size, delta: torch.Size, A: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return 2 * scan_flops(u, A)
