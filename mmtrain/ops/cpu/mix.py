"""The C++ mixer interior as torch custom operators ``mmtrain::selective_mix_fwd`` and ``_bwd``.

x is (Bt, Inner, L, D), or (Bt, Inner, L, 2D) with the gate behind it, float32 or bfloat16, in any strides; parameters
are float32, with the K directions first. The forward keeps the states at every 64th position,
(Bt·Inner, K, ceil(L/64) - 1, N, pad16(D)); the backward computes all the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import CHANNEL_PAD, CHUNK, MixArgs, MixView
from mmtrain.ops.orders import positions


def _view(tensor: Tensor) -> MixView:
    """(Bt, Inner, L, D) as the kernels index it: batch, inner batch, channel, position."""
    return MixView.of(tensor.transpose(2, 3))


def _states_shape(x: Tensor, A: Tensor, save_states: bool) -> tuple[int, ...]:
    padded = (A.shape[1] + CHANNEL_PAD - 1) // CHANNEL_PAD * CHANNEL_PAD
    boundaries = (x.shape[2] - 1) // CHUNK if save_states else 0
    return x.shape[0] * x.shape[1], A.shape[0], boundaries, A.shape[2], padded


def _address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _halves(x: Tensor, gated: bool) -> tuple[MixView, MixView]:
    """Views of x and of its gate."""
    if not gated:
        return _view(x), MixView()
    first, second = x.chunk(2, -1)
    return _view(first), _view(second)


def _args(x: Tensor, parameters: list[Tensor | None], order: Tensor, scale: float, gated: bool) -> MixArgs:
    """Of dense parameters; the caller keeps them alive."""
    views = _halves(x, gated)
    conv, conv_bias, x_proj, dt_proj, dt_bias, A, D = parameters
    assert A is not None
    assert dt_proj is not None
    return MixArgs(
        batch=x.shape[0] * x.shape[1],
        inner=x.shape[1],
        directions=A.shape[0],
        dim=A.shape[1],
        length=x.shape[2],
        state=A.shape[2],
        rank=dt_proj.shape[2],
        taps=0 if conv is None else conv.shape[2],
        scale=scale,
        x=views[0],
        z=views[1],
        order=order.data_ptr(),
        conv=_address(conv),
        conv_bias=_address(conv_bias),
        x_proj=_address(x_proj),
        dt_proj=_address(dt_proj),
        dt_bias=_address(dt_bias),
        A=_address(A),
        D=_address(D),
    )


@torch.library.custom_op("mmtrain::selective_mix_fwd", mutates_args=(), device_types="cpu")
def selective_mix_fwd(
    x: Tensor,
    conv: Tensor | None,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    orders: list[int],
    height: int,
    scale: float,
    gated: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """(out (Bt, Inner, L, D) in the layout of x, states); see the module's head."""
    out = torch.empty_like(x.chunk(2, -1)[0] if gated else x)
    states = A.new_empty(_states_shape(x, A, save_states))
    if x.numel():
        order = positions(tuple(orders), height, x.shape[2] // height)
        parameters = _dense(conv, conv_bias, x_proj, dt_proj, dt_bias, A, D)
        args = _args(x, parameters, order, scale, gated)
        args.out, args.states = _view(out), _address(states)
        library.loaded().call("mix_forward", args)
    return out, states


@selective_mix_fwd.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    A, (gated, save_states) = rest[5], rest[-2:]
    out = torch.empty_like(x.chunk(2, -1)[0] if gated else x)
    return out, A.new_empty(_states_shape(x, A, save_states))


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(x: Tensor, *parameters: Tensor | None) -> Gradients:
    """In the layout of x, the parameters dense; those of what is absent have no elements."""
    made = [x.new_empty(0, dtype=torch.float32) if p is None else p.new_empty(p.shape) for p in parameters]
    return torch.empty_like(x), *made  # type: ignore[return-value]


@torch.library.custom_op("mmtrain::selective_mix_bwd", mutates_args=(), device_types="cpu")
def selective_mix_bwd(
    dout: Tensor,
    x: Tensor,
    conv: Tensor | None,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    orders: list[int],
    height: int,
    scale: float,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D); of what is None, without elements."""
    grads = _empty_gradients(x, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    if not x.numel():
        for grad in grads:
            grad.zero_()
        return grads
    wanted = _states_shape(x, A, True)
    if states.shape != wanted:  # a forward without gradients kept none: run it again
        _, states = selective_mix_fwd(
            x, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, orders, height, scale, gated, True
        )
    order = positions(tuple(orders), height, x.shape[2] // height)
    parameters = _dense(conv, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    args = _args(x, parameters, order, scale, gated)
    args.states = _address(states)
    dx, *rest = grads
    args.dout, (args.dx, args.dz) = _view(dout), _halves(dx, gated)
    for name, grad in zip(("conv", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D"), rest, strict=True):
        setattr(args, f"d{name}", _address(grad))
    library.loaded().call("mix_backward", args)
    return grads


@selective_mix_bwd.register_fake
def _(dout: Tensor, x: Tensor, *rest: Any) -> Gradients:
    return _empty_gradients(x, *rest[:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.orders, ctx.height, ctx.scale, ctx.gated, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    grads = selective_mix_bwd(dout, *tensors, states, ctx.orders, ctx.height, ctx.scale, ctx.gated)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None, None


selective_mix_fwd.register_autograd(_backward, setup_context=_setup_context)


def mix_flops(
    x: torch.Size, conv: torch.Size | None, _: Any, x_proj: torch.Size, dt_proj: torch.Size, *rest: Any
) -> int:
    """Operations of one forward, of the shapes of its first arguments.

    For each position, channel and direction: convolution 2·taps, projections 2 a weight, scan 9·N + 1.
    """
    directions, channels, state = rest[1]
    each = 2 * (conv[2] if conv is not None else 0) + 2 * x_proj[1] + 2 * dt_proj[2] + 9 * state + 1
    return x[0] * x[1] * x[2] * channels * directions * each


@register_flop_formula(torch.ops.mmtrain.selective_mix_fwd)
def _forward_flops(*args: Any, **kwargs: Any) -> int:
    return mix_flops(*args)


@register_flop_formula(torch.ops.mmtrain.selective_mix_bwd)
def _backward_flops(dout: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * mix_flops(*args)
