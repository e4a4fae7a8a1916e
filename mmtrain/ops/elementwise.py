"""``keyed_dropout`` and ``weighted_sum``: elementwise operators, in C++ for float32 on the CPU, else in PyTorch.

``keyed_dropout`` is dropout with a mask that is a function of a seed per sample and of the position in the sample. The
C++ operator does not save the mask: the backward pass recomputes it from the seeds.

``weighted_sum`` is Σ_k w_k y_k (paper, "Weighted Averaging of Earlier Features"). The C++ operator makes one pass over
memory, and one for the gradients. In PyTorch it is a chain of ``addcmul``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend
from mmtrain.ops.arguments import check_tensors
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import DropoutArgs, WeightedSumArgs
from mmtrain.ops.registration import register

#: The hash input of element i is seed + i · STEP. STEP is odd and large, so neighbouring inputs are far apart.
STEP = -0x61C88647


def mix32(x: Tensor) -> Tensor:
    """Replace int32 ``x`` by a 32-bit hash of it (xor-shift and multiply) and return it. The high bits mix best."""
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)  # a logical shift: clear the copies of the sign bit
        x *= factor
    return x


def threshold(drop: float) -> int:
    """Return t such that P(hash < t) = ``drop`` for a signed 32-bit hash."""
    return int((drop - 0.5) * 2**32)


def keep_mask(seeds: Tensor, each: int, drop: float) -> Tensor:
    """Return a boolean mask (B, each) that is False with probability ``drop``.

    Args:
        seeds: (B,) int32.
        each: elements per sample.
    """
    steps = torch.arange(each, device=seeds.device, dtype=torch.int32) * STEP
    return mix32(seeds[:, None] + steps) >= threshold(drop)


def keyed_dropout(x: Tensor, seeds: Tensor, drop: float) -> Tensor:
    """Set elements of x to 0 with probability ``drop`` and multiply the others by 1/(1 - drop).

    Args:
        x: (B, ...).
        seeds: (B,) int32 on the device of x, one seed per sample.
        drop: in [0, 1).
    """
    check_tensors("keyed_dropout", {"x": x, "seeds": seeds})
    scale = 1 / (1 - drop)
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and backend.fusing()
    if fits and backend.choose("cpu", False) == "cpu":
        return keyed_dropout_op(x.contiguous(), seeds, threshold(drop), scale)
    keep = keep_mask(seeds, x.shape[1:].numel(), drop).view(x.shape)
    return x * (keep * scale).to(x.dtype)


@torch.library.custom_op("mmtrain::keyed_dropout", mutates_args=(), device_types="cpu")
def keyed_dropout_op(x: Tensor, seeds: Tensor, threshold: int, scale: float) -> Tensor:
    """Apply dropout to a contiguous float32 tensor.

    Args:
        threshold: elements whose hash is below it are set to 0.
        scale: factor of the other elements.
    """
    out = torch.empty_like(x)
    if x.numel():
        seeds = seeds.contiguous()
        args = DropoutArgs(
            batch=x.shape[0],
            each=x.numel() // x.shape[0],
            step=STEP & 0xFFFFFFFF,
            threshold=threshold,
            scale=scale,
            seeds=seeds.data_ptr(),
            x=x.data_ptr(),
            out=out.data_ptr(),
        )
        library.loaded().call("dropout", args)
    return out


def _dropout_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
    _, seeds, ctx.threshold, ctx.scale = inputs
    ctx.save_for_backward(seeds)


def _dropout_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
    (seeds,) = ctx.saved_tensors
    return keyed_dropout_op(dout.contiguous(), seeds, ctx.threshold, ctx.scale), None, None, None


register(
    keyed_dropout_op,
    lambda x, *rest: torch.empty_like(x),
    setup_context=_dropout_setup_context,
    backward=_dropout_backward,
)


def weighted_sum(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return Σ_k weight[k] · tensors[k].

    Args:
        tensors: n tensors of one shape and dtype.
        weight: (n,).
    """
    if not tensors:
        raise UserError("weighted_sum: tensors is empty; give at least one tensor")
    check_tensors("weighted_sum", {"weight": weight} | {f"tensors[{n}]": tensor for n, tensor in enumerate(tensors)})
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


def _sum_args(tensors: list[Tensor], weight: Tensor) -> WeightedSumArgs:
    size = tensors[0].numel()
    return WeightedSumArgs(count=len(tensors), size=size, inputs=_addresses(tensors), weight=weight.data_ptr())


def _sum_gradients(dout: Tensor, tensors: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(t) for t in tensors], weight.new_empty(weight.shape)


@torch.library.custom_op("mmtrain::weighted_sum_fwd", mutates_args=(), device_types="cpu")
def weighted_sum_fwd(tensors: list[Tensor], weight: Tensor) -> Tensor:
    """Compute :func:`weighted_sum` of contiguous float32 tensors."""
    out = torch.empty_like(tensors[0])
    weight = weight.contiguous()
    args = _sum_args(tensors, weight)
    args.out = out.data_ptr()
    library.loaded().call("weighted_sum_forward", args)
    return out


@torch.library.custom_op("mmtrain::weighted_sum_bwd", mutates_args=(), device_types="cpu")
def weighted_sum_bwd(dout: Tensor, tensors: list[Tensor], weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the tensors and the gradient of the weight."""
    grads, dweight = _sum_gradients(dout, tensors, weight)
    dout, weight = dout.contiguous(), weight.contiguous()
    args = _sum_args(tensors, weight)
    args.dout, args.dinputs, args.dweight = dout.data_ptr(), _addresses(grads), dweight.data_ptr()
    library.loaded().call("weighted_sum_backward", args)
    return grads, dweight


def _sum_setup_context(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    tensors, weight = inputs
    ctx.save_for_backward(*tensors, weight)


def _sum_backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], Tensor]:
    *tensors, weight = ctx.saved_tensors
    return weighted_sum_bwd(dout, tensors, weight)


register(
    weighted_sum_fwd,
    lambda tensors, weight: torch.empty_like(tensors[0]),
    setup_context=_sum_setup_context,
    backward=_sum_backward,
)
register(weighted_sum_bwd, _sum_gradients)
