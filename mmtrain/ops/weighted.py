"""``weighted_sum``: Σ_k w_k y_k in one pass, its gradients in one (paper, "Weighted Averaging of Earlier Features").

On the CPU in float32 a C++ operator, ``mmtrain::weighted_sum_fwd`` and ``_bwd``; elsewhere a chain of ``addcmul``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtrain.ops import backend
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import WeightedSumArgs
from mmtrain.ops.registration import register


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


def _addresses(tensors: list[Tensor]) -> ctypes.c_void_p:
    return ctypes.cast((ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)), ctypes.c_void_p)


def _args(tensors: list[Tensor], weight: Tensor) -> WeightedSumArgs:
    size = tensors[0].numel()
    return WeightedSumArgs(count=len(tensors), size=size, inputs=_addresses(tensors), weight=weight.data_ptr())


def _empty_gradients(dout: Tensor, tensors: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(t) for t in tensors], weight.new_empty(weight.shape)


@torch.library.custom_op("mmtrain::weighted_sum_fwd", mutates_args=(), device_types="cpu")
def weighted_sum_fwd(tensors: list[Tensor], weight: Tensor) -> Tensor:
    """Contiguous float32 tensors of one shape."""
    out = torch.empty_like(tensors[0])
    weight = weight.contiguous()
    args = _args(tensors, weight)
    args.out = out.data_ptr()
    library.loaded().call("weighted_sum_forward", args)
    return out


@torch.library.custom_op("mmtrain::weighted_sum_bwd", mutates_args=(), device_types="cpu")
def weighted_sum_bwd(dout: Tensor, tensors: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """(gradients of the tensors, gradient of the weight)."""
    grads, dweight = _empty_gradients(dout, tensors, weight)
    dout, weight = dout.contiguous(), weight.contiguous()
    args = _args(tensors, weight)
    args.dout, args.dinputs, args.dweight = dout.data_ptr(), _addresses(grads), dweight.data_ptr()
    library.loaded().call("weighted_sum_backward", args)
    return grads, dweight


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    tensors, weight = inputs
    ctx.save_for_backward(*tensors, weight)


def _backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], Tensor]:
    *tensors, weight = ctx.saved_tensors
    return weighted_sum_bwd(dout, tensors, weight)


register(
    weighted_sum_fwd,
    lambda tensors, weight: torch.empty_like(tensors[0]),
    setup_context=_setup_context,
    backward=_backward,
)
register(weighted_sum_bwd, _empty_gradients)
