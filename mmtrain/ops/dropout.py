"""``keyed_dropout``: dropout whose mask is a function of a seed for each sample and the place within it.

On the CPU in float32 a C++ operator, ``mmtrain::keyed_dropout``, which keeps no mask: the gradient goes through it with
the same seeds. Elsewhere the same mask by PyTorch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtrain.ops import backend
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import DropoutArgs
from mmtrain.ops.registration import register

#: Weyl steps of an odd constant, so that neighbouring elements start far apart.
STEP = -0x61C88647


def mix32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift and multiply, in place) of int32 ``x``; its high bits are the good ones."""
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)  # the shift must bring in zeros, not the sign
        x *= factor
    return x


def threshold(drop: float) -> int:
    """What a hash, as a signed 32-bit number, is below with probability ``drop``."""
    return int((drop - 0.5) * 2**32)


def keep_mask(seeds: Tensor, each: int, drop: float) -> Tensor:
    """Boolean (B, each), False with probability ``drop``; seeds (B,) int32."""
    steps = torch.arange(each, device=seeds.device, dtype=torch.int32) * STEP
    return mix32(seeds[:, None] + steps) >= threshold(drop)


def keyed_dropout(x: Tensor, seeds: Tensor, drop: float) -> Tensor:
    """x with elements set to 0 with probability ``drop`` and the others scaled by 1/(1 - drop).

    Args:
        x: (B, ...).
        seeds: (B,) int32, on the device of x.
        drop: in [0, 1).
    """
    scale = 1 / (1 - drop)
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and backend.fusing()
    if fits and backend.choose("cpu", False) == "cpu":
        return keyed_dropout_op(x.contiguous(), seeds, threshold(drop), scale)
    keep = keep_mask(seeds, x[0].numel(), drop).view(x.shape)
    return x * (keep * scale).to(x.dtype)


@torch.library.custom_op("mmtrain::keyed_dropout", mutates_args=(), device_types="cpu")
def keyed_dropout_op(x: Tensor, seeds: Tensor, threshold: int, scale: float) -> Tensor:
    """Of a contiguous float32 x."""
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


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
    _, seeds, ctx.threshold, ctx.scale = inputs
    ctx.save_for_backward(seeds)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
    (seeds,) = ctx.saved_tensors
    return keyed_dropout_op(dout.contiguous(), seeds, ctx.threshold, ctx.scale), None, None, None


register(keyed_dropout_op, lambda x, *rest: torch.empty_like(x), setup_context=_setup_context, backward=_backward)
