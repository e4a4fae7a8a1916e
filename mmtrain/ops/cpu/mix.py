"""The C++ mixer interior as torch custom operators ``mmtrain::selective_mix_fwd`` and ``_bwd``.

x is (Bt, Inner, L, D), or (Bt, Inner, L, 2D) with the gate behind it, float32 or bfloat16, in any strides; parameters
are float32, with the K directions first. The forward keeps the states at every 64th position,
(Bt·Inner, K, ceil(L/64) - 1, N, pad16(D)); the backward computes all the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.arguments import positions
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import CHANNEL_PAD, CHUNK, MixArgs, MixView, address
from mmtrain.ops.registration import register_pair

_PARAMETERS = ("conv", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")
_TENSORS = ", ".join(["Tensor x", *(f"Tensor{'?' if name.startswith('conv') else ''} {name}" for name in _PARAMETERS)])
_SETTINGS = "SymInt[] orders, SymInt height, float scale, bool gated"


def _view(tensor: Tensor) -> MixView:
    """(Bt, Inner, L, D) as the kernels index it: batch, inner batch, channel, position."""
    return MixView.of(tensor.transpose(2, 3))


def _halves(x: Tensor, gated: bool) -> tuple[MixView, MixView]:
    """Views of x and of its gate."""
    if not gated:
        return _view(x), MixView()
    first, second = x.chunk(2, -1)
    return _view(first), _view(second)


def _args(tensors: tuple[Any, ...], orders: list[int], height: int, scale: float, gated: bool) -> MixArgs:
    x = tensors[0]
    order = positions(tuple(orders), height, x.shape[2] // height)
    dense: list[Any] = [None if t is None else t.contiguous() for t in tensors[1:]]
    conv, _, _, dt_proj, _, A, _ = dense
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
    args.alive = (order, dense)  # for as long as their addresses are used
    return args


def _empty_outputs(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    A, (gated, save_states) = rest[5], rest[-2:]
    padded = (A.shape[1] + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    boundaries = (x.shape[2] - 1) // CHUNK if save_states else 0
    states = A.new_empty(x.shape[0] * x.shape[1], A.shape[0], boundaries, A.shape[2], padded)
    return torch.empty_like(x.chunk(2, -1)[0] if gated else x), states


@torch.library.custom_op(
    "mmtrain::selective_mix_fwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_SETTINGS}, bool save_states) -> (Tensor, Tensor)",
)
def selective_mix_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(out (Bt, Inner, L, D) in the layout of x, states); see the module's head."""
    out, states = _empty_outputs(*arguments)
    if out.numel():
        args = _args(arguments[:8], *arguments[8:12])
        args.out, args.states = _view(out), address(states)
        library.loaded().call("mix_forward", args)
    return out, states


def _empty_gradients(dout: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """In the layout of x, the parameters dense; those of what is absent have no elements."""
    made = [x.new_empty(0, dtype=torch.float32) if p is None else p.new_empty(p.shape) for p in rest[:7]]
    return torch.empty_like(x), *made


@torch.library.custom_op(
    "mmtrain::selective_mix_bwd",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dout, {_TENSORS}, Tensor states, {_SETTINGS}) -> ({', '.join(['Tensor'] * 8)})",
)
def selective_mix_bwd(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x and the parameters; of what is None, without elements."""
    dx, *rest = grads = _empty_gradients(dout, *arguments)
    tensors, states, settings = arguments[:8], arguments[8], arguments[9:]
    if not dx.numel():
        for grad in grads:
            grad.zero_()
        return grads
    if states.shape[2] != (dx.shape[2] - 1) // CHUNK:  # a forward without gradients kept none: run it again
        _, states = selective_mix_fwd(*tensors, *settings, True)
    args = _args(tensors, *settings)
    args.states = address(states)
    args.dout, (args.dx, args.dz) = _view(dout), _halves(dx, settings[-1])
    for name, grad in zip(_PARAMETERS, rest, strict=True):
        setattr(args, f"d{name}", address(grad))
    library.loaded().call("mix_backward", args)
    return grads


def mix_flops(x: torch.Size, conv: torch.Size | None, *parameters: Any, **_: Any) -> int:
    """Operations of one forward, of the shapes of its first arguments.

    For each position, channel and direction: convolution 2·taps, projections 2 a weight, scan 9·N + 1.
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
    fake=_empty_outputs,
    fake_backward=_empty_gradients,
    flops=mix_flops,
)
