"""The causal convolution in Triton as torch custom operators ``mmtrain::causal_conv1d_triton_fwd`` and ``_bwd``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmtrain.ops.registration import conv_flops
from mmtrain.ops.triton import tuning
from mmtrain.ops.triton.conv_kernels import conv_backward, conv_forward
from mmtrain.ops.triton.tuning import minor, on_its_device, returned

WIDEST = 8  # taps
SEGMENT = 128  # positions that a backward program walks in one go


@torch.library.custom_op("mmtrain::causal_conv1d_triton_fwd", mutates_args=())
@on_its_device
def causal_conv1d_triton_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """(Bt, D, L), dtype and layout of x; weight (D, W), W <= 8."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    out = x.new_empty(batch, length, dim)
    if x.numel():
        x_in, weight = minor(x), weight.contiguous()
        launch = tuning.narrower(tuning.lookup("conv_forward", "any", tuning.architecture(x.device)), dim)
        programs = -(-dim // launch.block_d) * -(-length // launch.unroll) * batch
        conv_forward[(programs,)](
            x_in,
            weight,
            weight if bias is None else bias.contiguous(),
            out,
            x_in.stride(0),
            x_in.stride(2),
            length,
            dim,
            WIDTH=width,
            HAS_BIAS=bias is not None,
            SILU=silu,
            REVERSE=reverse,
            BLOCK_T=launch.unroll,
            BLOCK_D=launch.block_d,
            **launch.options(),
        )
    return returned(out, x)


@causal_conv1d_triton_fwd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return returned(x.new_empty(x.shape[0], x.shape[2], x.shape[1]), x)


@torch.library.custom_op("mmtrain::causal_conv1d_triton_bwd", mutates_args=())
@on_its_device
def causal_conv1d_triton_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx channels-last, dweight, dbias); dbias has no elements without a bias. The same bits in every run."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    dx = x.new_empty(batch, length, dim)
    if not x.numel():
        return dx.transpose(1, 2), torch.zeros_like(weight), x.new_zeros(0 if bias is None else dim)
    x_in, dout, dense_weight = minor(x), minor(dout), weight.contiguous()
    launch = tuning.narrower(tuning.lookup("conv_backward", "any", tuning.architecture(x.device)), dim)
    blocks = -(-dim // launch.block_d)
    segment = tuning.forced("segment") or SEGMENT
    pairs = batch * -(-length // segment)
    # Partial sums of the weights: as many as keep the GPU busy for a few rounds, not one for every segment.
    items = tuning.forced("batches") or max(
        1, pairs * blocks * launch.warps // (128 * tuning.multiprocessors(x.device))
    )
    parts = -(-pairs // items)
    dweight = x.new_empty(parts, dim, width, dtype=torch.float32)
    dbias = x.new_empty(parts, dim, dtype=torch.float32)
    conv_backward[(parts * blocks,)](
        dout,
        x_in,
        dense_weight,
        dense_weight if bias is None else bias.contiguous(),
        dx,
        dweight,
        dbias,
        dout.stride(0),
        dout.stride(2),
        x_in.stride(0),
        x_in.stride(2),
        batch,
        length,
        dim,
        segment,
        items,
        WIDTH=width,
        HAS_BIAS=bias is not None,
        SILU=silu,
        REVERSE=reverse,
        UNROLL=launch.unroll,
        BLOCK_D=launch.block_d,
        **launch.options(),
    )
    return (
        dx.transpose(1, 2),
        dweight.sum(0).to(weight.dtype),
        x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
    )


@causal_conv1d_triton_bwd.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return dx, weight.new_empty(weight.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = causal_conv1d_triton_bwd(dout, x, weight, bias, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None


causal_conv1d_triton_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mmtrain.causal_conv1d_triton_fwd)
def _forward_flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return conv_flops(x, weight)


@register_flop_formula(torch.ops.mmtrain.causal_conv1d_triton_bwd)
def _backward_flops(dout: torch.Size, x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * conv_flops(x, weight)
