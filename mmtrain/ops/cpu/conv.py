"""The C++ causal convolution as torch custom operators ``mmtrain::causal_conv1d_fwd`` and ``_bwd`` (float32)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import ConvArgs, View3


def _conv_args(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> ConvArgs:
    """Of dense parameters; the caller keeps them alive."""
    return ConvArgs(
        batch=x.shape[0],
        dim=x.shape[1],
        length=x.shape[2],
        width=weight.shape[1],
        silu=silu,
        reverse=reverse,
        x=View3.of(x),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
    )


@torch.library.custom_op("mmtrain::causal_conv1d_fwd", mutates_args=(), device_types="cpu")
def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """(Bt, D, L) in the layout of x."""
    out = torch.empty_like(x)
    if x.numel():
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        args = _conv_args(x, weight, bias, silu, reverse)
        args.out = View3.of(out)
        library.loaded().call("conv_forward", args)
    return out


@causal_conv1d_fwd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return torch.empty_like(x)


def _empty_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


@torch.library.custom_op("mmtrain::causal_conv1d_bwd", mutates_args=(), device_types="cpu")
def causal_conv1d_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); dbias has no elements without a bias."""
    dx, dweight, dbias = grads = _empty_gradients(x, weight, bias)
    if not x.numel():
        dweight.zero_(), dbias.zero_()
        return grads
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    args = _conv_args(x, weight, bias, silu, reverse)
    args.dout, args.dx = View3.of(dout), View3.of(dx)
    args.dweight, args.dbias = dweight.data_ptr(), None if bias is None else dbias.data_ptr()
    library.loaded().call("conv_backward", args)
    return grads


@causal_conv1d_bwd.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = causal_conv1d_bwd(dout, x, weight, bias, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None


causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)


def conv_flops(x_shape: torch.Size, weight_shape: torch.Size) -> int:
    """Floating-point operations of one forward convolution: 2·Bt·D·L·K."""
    batch, channels, length = x_shape
    return 2 * batch * channels * length * weight_shape[1]


@register_flop_formula(torch.ops.mmtrain.causal_conv1d_fwd)
def _forward_flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return conv_flops(x, weight)


@register_flop_formula(torch.ops.mmtrain.causal_conv1d_bwd)
def _backward_flops(dout: torch.Size, x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * conv_flops(x, weight)
