"""The C++ kernels of the scan, the convolution and the mixer as torch custom operators.

``mmtrain::selective_scan_fwd`` takes u and delta (Bt, D, L) in float32 or bfloat16, B and C (Bt, G, N, L) and all other
tensors in float32, with any strides. It returns the output, the last state (Bt, D, N) and the states at every 64th
position (Bt, ceil(L/64) - 1, N, G·pad16(D/G)). States that are not requested have no elements.

``mmtrain::causal_conv1d_fwd`` takes x (Bt, D, L) in float32 or bfloat16 and a float32 weight (D, K).

``mmtrain::selective_mix_fwd`` is the inner part of a mixer. It takes x (Bt, Inner, L, D), or (Bt, Inner, L, 2D) where
the second half of the channels is the gate, in float32 or bfloat16 with any strides. The parameters are float32, with
the K directions as the first dimension. It returns the output and the states at every 64th position,
(Bt·Inner, K, ceil(L/64) - 1, N, pad16(D)).

The backward operators ``_bwd`` recompute everything else. Their results are bit-identical for any number of threads.
The gradient of an argument that is None has no elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.arguments import positions
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import CHANNEL_PAD, CHUNK, ConvArgs, MixArgs, MixView, ScanArgs, View3, View4, address
from mmtrain.ops.registration import conv_flops, register_pair, scan_flops


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _gradients(tensors: tuple[Any, ...], in_layout: tuple[int, ...] = (0,)) -> tuple[Tensor, ...]:
    """Allocate the gradients of ``tensors``. That of None has no elements.

    Args:
        in_layout: indices of tensors whose gradients have the strides of the tensor; the others are contiguous.
    """
    lead = tensors[0]
    return tuple(
        lead.new_empty(0, dtype=torch.float32)
        if t is None
        else torch.empty_like(t)
        if i in in_layout
        else t.new_empty(t.shape)
        for i, t in enumerate(tensors)
    )


def _zeroed(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Set all gradients to 0, for an empty batch."""
    for gradient in gradients:
        gradient.zero_()
    return gradients


# ----------------------------------------------------------------------------------------------------------- the scan

_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? initial_state"
_FLAGS = "bool delta_softplus, bool reverse"


def _scan_new_states(u: Tensor, A: Tensor, B: Tensor, save_states: bool) -> Tensor:
    groups = B.shape[1]
    padded = (u.shape[1] // groups + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    boundaries = (u.shape[2] - 1) // CHUNK if save_states else 0
    return A.new_empty(u.shape[0], boundaries, B.shape[2], groups * padded)


def _scan_args(tensors: tuple[Any, ...], delta_softplus: bool, reverse: bool) -> ScanArgs:
    u, delta, A, B, C, *optional = tensors
    A, D, bias, initial = dense = _dense(A, *optional)
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
    args.alive = dense  # keep the tensors alive while their addresses are used
    return args


def _scan_empty_outputs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_states, return_last_state = rest[-2:]
    last = A.new_empty(u.shape[0], *A.shape) if return_last_state else A.new_empty(0)
    return torch.empty_like(u), last, _scan_new_states(u, A, B, save_states)


@torch.library.custom_op(
    "mmtrain::selective_scan_fwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_SCAN}, {_FLAGS}, bool save_states, bool return_last_state) -> (Tensor, Tensor, Tensor)",
)
def selective_scan_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, last_state, states), see the docstring of this module."""
    out, last, states = outputs = _scan_empty_outputs(*arguments)
    if out.numel():
        args = _scan_args(arguments[:8], *arguments[8:10])
        args.out, args.last, args.states = View3.of(out), address(last), address(states)
        library.loaded().call("scan_forward", args)
    return outputs


def _scan_gradients(dout: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _gradients(arguments[:8], in_layout=(0, 1, 3, 4))


@torch.library.custom_op(
    "mmtrain::selective_scan_bwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dout, Tensor dlast, {_SCAN}, Tensor states, {_FLAGS}) -> ({', '.join(['Tensor'] * 8)})",
)
def selective_scan_bwd(dout: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients (du, ddelta, dA, dB, dC, dD, ddelta_bias, dinitial_state).

    Args:
        dlast: gradient of the last state; without elements if there is none.
    """
    grads = _scan_gradients(dout, dlast, *arguments)
    u, _, A, B, *_ = arguments
    states, *flags = arguments[8:]
    if not u.numel():
        return _zeroed(grads)
    args = _scan_args(arguments[:8], *flags)
    dlast = dlast.contiguous()
    args.dlast = address(dlast)
    if not states.numel() and u.shape[2] > CHUNK:  # the forward pass saved no states: recompute them
        states = _scan_new_states(u, A, B, True)
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
    fake=_scan_empty_outputs,
    fake_backward=_scan_gradients,
    flops=lambda u, delta, A, *rest, **_: scan_flops(u, A),
)


# ---------------------------------------------------------------------------------------------------- the convolution


def _conv_args(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> ConvArgs:
    dense = _dense(weight, bias)
    args = ConvArgs(
        batch=x.shape[0],
        dim=x.shape[1],
        length=x.shape[2],
        width=weight.shape[1],
        silu=silu,
        reverse=reverse,
        x=View3.of(x),
        weight=address(dense[0]),
        bias=address(dense[1]),
    )
    args.alive = dense  # keep the tensors alive while their addresses are used
    return args


@torch.library.custom_op("mmtrain::causal_conv1d_fwd", mutates_args=(), device_types="cpu")
def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return the convolution (Bt, D, L) in the layout of x."""
    out = torch.empty_like(x)
    if x.numel():
        args = _conv_args(x, weight, bias, silu, reverse)
        args.out = View3.of(out)
        library.loaded().call("conv_forward", args)
    return out


@torch.library.custom_op("mmtrain::causal_conv1d_bwd", mutates_args=(), device_types="cpu")
def causal_conv1d_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dx, dweight, dbias). dbias has no elements without a bias."""
    dx, dweight, dbias = grads = _gradients((x, weight, bias))
    if not x.numel():
        _zeroed(grads)
        return dx, dweight, dbias
    args = _conv_args(x, weight, bias, silu, reverse)
    args.dout, args.dx, args.dweight, args.dbias = View3.of(dout), View3.of(dx), address(dweight), address(dbias)
    library.loaded().call("conv_backward", args)
    return dx, dweight, dbias


register_pair(
    causal_conv1d_fwd,
    causal_conv1d_bwd,
    tensors=3,
    settings=2,
    fake=lambda x, *rest: torch.empty_like(x),
    fake_backward=lambda dout, *arguments: _gradients(arguments[:3]),
    flops=lambda x, weight, *rest, **_: conv_flops(x, weight),
)


# ---------------------------------------------------------------------------------------------------------- the mixer

_PARAMETERS = ("conv", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")
_MIX = ", ".join(["Tensor x", *(f"Tensor{'?' if name.startswith('conv') else ''} {name}" for name in _PARAMETERS)])
_SETTINGS = "SymInt[] orders, SymInt height, float scale, bool gated"


def _view(tensor: Tensor) -> MixView:
    """Return a view of a tensor (Bt, Inner, L, D) with the kernels' indices (batch, inner batch, channel, position)."""
    return MixView.of(tensor.transpose(2, 3))


def _halves(x: Tensor, gated: bool) -> tuple[MixView, MixView]:
    """Return views of x and of its gate."""
    if not gated:
        return _view(x), MixView()
    first, second = x.chunk(2, -1)
    return _view(first), _view(second)


def _mix_args(tensors: tuple[Any, ...], orders: list[int], height: int, scale: float, gated: bool) -> MixArgs:
    x = tensors[0]
    order = positions(tuple(orders), height, x.shape[2] // height)
    conv, _, _, dt_proj, _, A, _ = dense = _dense(*tensors[1:])
    args = MixArgs(
        batch=x.shape[0] * x.shape[1],
        inner=x.shape[1],
        directions=A.shape[0],
        dim=A.shape[1],
        length=x.shape[2],
        state=A.shape[2],
        rank=dt_proj.shape[2],
        taps=0 if conv is None else conv.shape[2],
        scale=scale,
        order=order.data_ptr(),
    )
    args.x, args.z = _halves(x, gated)
    for name, tensor in zip(_PARAMETERS, dense, strict=True):
        setattr(args, name, address(tensor))
    args.alive = (order, dense)  # keep the tensors alive while their addresses are used
    return args


def _mix_empty_outputs(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    A, (gated, save_states) = rest[5], rest[-2:]
    padded = (A.shape[1] + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    boundaries = (x.shape[2] - 1) // CHUNK if save_states else 0
    states = A.new_empty(x.shape[0] * x.shape[1], A.shape[0], boundaries, A.shape[2], padded)
    return torch.empty_like(x.chunk(2, -1)[0] if gated else x), states


@torch.library.custom_op(
    "mmtrain::selective_mix_fwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_MIX}, {_SETTINGS}, bool save_states) -> (Tensor, Tensor)",
)
def selective_mix_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return (out (Bt, Inner, L, D) in the layout of x, states), see the docstring of this module."""
    out, states = _mix_empty_outputs(*arguments)
    if out.numel():
        args = _mix_args(arguments[:8], *arguments[8:12])
        args.out, args.states = _view(out), address(states)
        library.loaded().call("mix_forward", args)
    return out, states


@torch.library.custom_op(
    "mmtrain::selective_mix_bwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dout, {_MIX}, Tensor states, {_SETTINGS}) -> ({', '.join(['Tensor'] * 8)})",
)
def selective_mix_bwd(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the parameters. Those of None have no elements."""
    dx, *rest = grads = _gradients(arguments[:8])
    tensors, states, settings = arguments[:8], arguments[8], arguments[9:]
    if not dx.numel():
        return _zeroed(grads)
    if states.shape[2] != (dx.shape[2] - 1) // CHUNK:  # the forward pass saved no states: recompute them
        _, states = selective_mix_fwd(*tensors, *settings, True)
    args = _mix_args(tensors, *settings)
    args.states = address(states)
    args.dout, (args.dx, args.dz) = _view(dout), _halves(dx, settings[-1])
    for name, grad in zip(_PARAMETERS, rest, strict=True):
        setattr(args, f"d{name}", address(grad))
    library.loaded().call("mix_backward", args)
    return grads


def mix_flops(x: torch.Size, conv: torch.Size | None, *parameters: Any, **_: Any) -> int:
    """Return the floating-point operations of a forward pass.

    For each position, channel and direction these are 2·taps for the convolution, 2 per weight for the projections, and
    9·N + 1 for the scan. The arguments are the shapes of the tensors of ``selective_mix_fwd``.
    """
    _, x_proj, dt_proj, _, (directions, channels, state) = parameters[:5]
    each = 2 * (conv[2] if conv is not None else 0) + 2 * x_proj[1] + 2 * dt_proj[2] + 9 * state + 1
    return x[0] * x[1] * x[2] * channels * directions * each


register_pair(
    selective_mix_fwd,
    selective_mix_bwd,
    tensors=8,
    settings=4,
    states=True,
    fake=_mix_empty_outputs,
    fake_backward=lambda dout, *arguments: _gradients(arguments[:8]),
    flops=mix_flops,
)
