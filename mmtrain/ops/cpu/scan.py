"""The C++ selective scan as torch custom operators: eager, torch.compile, fake tensors, autograd, FLOP counts.

``mmtrain::selective_scan_fwd`` returns the output, the last state (Bt, D, N) and the states at every 64th position
(Bt, ceil(L/64) - 1, N, G·pad16(D/G)), both empty when not asked for; ``mmtrain::selective_scan_bwd`` recomputes the
rest. u and delta are float32 or bfloat16, all others float32; B and C (Bt, G, N, L); any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import CHANNEL_PAD, CHUNK, ScanArgs, View3, View4, address
from mmtrain.ops.registration import register_pair, scan_flops

_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? initial_state"
_FLAGS = "bool delta_softplus, bool reverse"


def _new_states(u: Tensor, A: Tensor, B: Tensor, save_states: bool) -> Tensor:
    groups = B.shape[1]
    padded = (u.shape[1] // groups + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    boundaries = (u.shape[2] - 1) // CHUNK if save_states else 0
    return A.new_empty(u.shape[0], boundaries, B.shape[2], groups * padded)


def _args(tensors: tuple[Any, ...], delta_softplus: bool, reverse: bool) -> ScanArgs:
    u, delta, A, B, C, *optional = tensors
    dense: list[Any] = [None if t is None else t.contiguous() for t in (A, *optional)]
    A, D, bias, initial = dense
    args = ScanArgs(
        batch=u.shape[0],
        dim=u.shape[1],
        length=u.shape[2],
        state=A.shape[1],
        groups=B.shape[1],
        softplus=delta_softplus,
        reverse=reverse,
        u=View3.of(u),
        delta=View3.of(delta),
        A=address(A),
        B=View4.of(B),
        C=View4.of(C),
        D=address(D),
        bias=address(bias),
        initial=address(initial),
    )
    args.alive = dense  # for as long as their addresses are used
    return args


def _empty_outputs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_states, return_last_state = rest[-2:]
    last = A.new_empty(u.shape[0], *A.shape) if return_last_state else A.new_empty(0)
    return torch.empty_like(u), last, _new_states(u, A, B, save_states)


@torch.library.custom_op(
    "mmtrain::selective_scan_fwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_FLAGS}, bool save_states, bool return_last_state) -> (Tensor, Tensor, Tensor)",
)
def selective_scan_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, last_state, states); see the module's head."""
    out, last, states = outputs = _empty_outputs(*arguments)
    if out.numel():
        args = _args(arguments[:8], *arguments[8:10])
        args.out, args.last, args.states = View3.of(out), address(last), address(states)
        library.loaded().call("scan_forward", args)
    return outputs


def _empty_gradients(dout: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """In the layout of what they are gradients of; those of absent parameters have no elements."""
    u, delta, A, B, C, *optional = arguments[:8]
    dD, dbias, dinitial = (u.new_empty(0) if p is None else p.new_empty(p.shape) for p in optional)
    like = torch.empty_like
    return like(u), like(delta), A.new_empty(A.shape), like(B), like(C), dD, dbias, dinitial


@torch.library.custom_op(
    "mmtrain::selective_scan_bwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dout, Tensor dlast, {_TENSORS}, Tensor states, {_FLAGS}) -> ({', '.join(['Tensor'] * 8)})",
)
def selective_scan_bwd(dout: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """(du, ddelta, dA, dB, dC, dD, ddelta_bias, dinitial_state); bit for bit the same for any number of threads.

    ``dlast`` has no elements if there is no gradient of the last state.
    """
    grads = _empty_gradients(dout, dlast, *arguments)
    u, _, A, B, *_ = arguments
    states, *flags = arguments[8:]
    if not u.numel():
        for grad in grads:
            grad.zero_()
        return grads
    args = _args(arguments[:8], *flags)
    dlast = dlast.contiguous()
    args.dlast = address(dlast)
    if not states.numel() and u.shape[2] > CHUNK:  # the forward ran without gradients in mind: its states once more
        states = _new_states(u, A, B, True)
        args.states = address(states)
        library.loaded().call("scan_forward", args)
    args.states = address(states)
    du, ddelta, dA, dB, dC, dD, dbias, dinitial = grads
    args.dout, args.du, args.ddelta = View3.of(dout), View3.of(du), View3.of(ddelta)
    args.dA, args.dB, args.dC = address(dA), View4.of(dB), View4.of(dC)
    args.dD, args.dbias, args.dinitial = address(dD), address(dbias), address(dinitial)
    library.loaded().call("scan_backward", args)
    return grads


register_pair(
    selective_scan_fwd,
    selective_scan_bwd,
    tensors=8,
    settings=2,
    outputs=2,
    states=True,
    fake=_empty_outputs,
    fake_backward=_empty_gradients,
    flops=lambda u, delta, A, *rest, **_: scan_flops(u, A),
)
