"""``weighted_sum``: Σ_k w_k y_k in one pass, its gradients in one (paper, "Weighted Averaging of Earlier Features").

On the CPU in float32 a C++ operator, ``mmtrain::weighted_sum_fwd`` and ``_bwd``; elsewhere a chain of ``addcmul``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops import backend
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import WeightedSumArgs


def weighted_sum(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Σ_k weight[k] · tensors[k].

    Args:
        tensors: n of one shape and dtype.
        weight: (n,).
    """
    first = tensors[0]
    fits = first.device.type == "cpu" and all(t.dtype == torch.float32 for t in (*tensors, weight))
    if fits and backend.choose("cpu", False) == "cpu":
        return weighted_sum_fwd([t.contiguous() for t in tensors], weight)
    total = first * weight[0]
    for w, y in zip(weight[1:], tensors[1:], strict=True):
        total = torch.addcmul(total, y, w)
    return total


def _args(tensors: list[Tensor], weight: Tensor) -> WeightedSumArgs:
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    return WeightedSumArgs(
        count=len(tensors),
        size=tensors[0].numel(),
        inputs=ctypes.cast(pointers, ctypes.c_void_p),
        weight=weight.data_ptr(),
    )


@torch.library.custom_op("mmtrain::weighted_sum_fwd", mutates_args=(), device_types="cpu")
def weighted_sum_fwd(tensors: list[Tensor], weight: Tensor) -> Tensor:
    """Contiguous float32 tensors of one shape."""
    out = torch.empty_like(tensors[0])
    weight = weight.contiguous()
    args = _args(tensors, weight)
    args.out = out.data_ptr()
    library.loaded().call("weighted_sum_forward", args)
    return out


@weighted_sum_fwd.register_fake
def _(tensors: list[Tensor], weight: Tensor) -> Tensor:
    return torch.empty_like(tensors[0])


@torch.library.custom_op("mmtrain::weighted_sum_bwd", mutates_args=(), device_types="cpu")
def weighted_sum_bwd(dout: Tensor, tensors: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """(gradients of the tensors, gradient of the weight)."""
    grads, dweight = (
        [torch.empty_like(t) for t in tensors],
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )
    dout, weight = dout.contiguous(), weight.contiguous()
    args = _args(tensors, weight)
    pointers = (ctypes.c_void_p * len(grads))(*(t.data_ptr() for t in grads))
    args.dout, args.dinputs, args.dweight = dout.data_ptr(), ctypes.cast(pointers, ctypes.c_void_p), dweight.data_ptr()
    library.loaded().call("weighted_sum_backward", args)
    return grads, dweight


@weighted_sum_bwd.register_fake
def _(dout: Tensor, tensors: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(t) for t in tensors], weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    tensors, weight = inputs
    ctx.save_for_backward(*tensors, weight)


def _backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], Tensor]:
    *tensors, weight = ctx.saved_tensors
    return weighted_sum_bwd(dout, tensors, weight)


weighted_sum_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mmtrain.weighted_sum_fwd)
def _forward_flops(*args: Any, **kwargs: Any) -> int:
    return 0  # as torch's counter takes elementwise operators


@register_flop_formula(torch.ops.mmtrain.weighted_sum_bwd)
def _backward_flops(*args: Any, **kwargs: Any) -> int:
    return 0
