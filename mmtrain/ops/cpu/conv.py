"""The C++ causal convolution as torch custom operators ``mmtrain::causal_conv1d_fwd`` and ``_bwd``.

x is float32 or bfloat16, in any strides; weight and bias are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import ConvArgs, View3, address
from mmtrain.ops.registration import conv_flops, register_pair


def _args(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> ConvArgs:
    dense = [None if t is None else t.contiguous() for t in (weight, bias)]
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
    args.alive = dense  # for as long as their addresses are used
    return args


@torch.library.custom_op("mmtrain::causal_conv1d_fwd", mutates_args=(), device_types="cpu")
def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """(Bt, D, L) in the layout of x."""
    out = torch.empty_like(x)
    if x.numel():
        args = _args(x, weight, bias, silu, reverse)
        args.out = View3.of(out)
        library.loaded().call("conv_forward", args)
    return out


def _empty_gradients(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *flags: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


@torch.library.custom_op("mmtrain::causal_conv1d_bwd", mutates_args=(), device_types="cpu")
def causal_conv1d_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); dbias has no elements without a bias."""
    dx, dweight, dbias = grads = _empty_gradients(dout, x, weight, bias)
    if not x.numel():
        dweight.zero_(), dbias.zero_()
        return grads
    args = _args(x, weight, bias, silu, reverse)
    args.dout, args.dx, args.dweight, args.dbias = View3.of(dout), View3.of(dx), address(dweight), address(dbias)
    library.loaded().call("conv_backward", args)
    return grads


register_pair(
    causal_conv1d_fwd,
    causal_conv1d_bwd,
    tensors=3,
    settings=2,
    fake=lambda x, *rest: torch.empty_like(x),
    fake_backward=_empty_gradients,
    flops=lambda x, weight, *rest, **_: conv_flops(x, weight),
)
