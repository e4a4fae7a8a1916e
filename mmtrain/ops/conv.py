"""``causal_conv1d``, a depthwise causal convolution along the sequence. It uses the same backend as the scan."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend, upstream
from mmtrain.ops.arguments import check_floats, check_shape, layout_like
from mmtrain.ops.cpu.operators import causal_conv1d_fwd
from mmtrain.ops.reference import causal_conv1d_reference

OP = "causal_conv1d"
MOST_TAPS = 8  # limit of the Triton kernel


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    reverse: bool = False,
) -> Tensor:
    """Depthwise causal convolution: y_t = bias + Σ_k weight_k x_{t-K+1+k}, zeros before the start.

    Args:
        x: (Bt, D, L), float32, bfloat16, float16 or float64; layouts as for ``selective_scan``.
        weight: (D, K), K >= 1. The last tap multiplies the current position.
        bias: (D,).
        activation: None or "silu", applied to the output.
        reverse: anti-causal convolution. Equivalent to flipping input and output along L.

    Returns:
        (Bt, D, L) with the dtype and memory layout of x. Sums are float32 (float64 for float64 inputs).

    Raises:
        UserError: if an argument does not fit (the message names it), or if the requested backend cannot run.
    """
    check_floats(OP, "x", {"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise UserError(f"{OP}: x has shape {tuple(x.shape)}, expected (batch, channels, positions)")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise UserError(f"{OP}: weight has shape {tuple(weight.shape)}, expected (D, K) with D = {channels} and K >= 1")
    if bias is not None:
        check_shape(OP, "bias", bias, (channels,), "(D,)")
    if activation not in (None, "silu"):
        raise UserError(f"{OP}: activation={activation!r}: must be None or 'silu'")
    float64 = x.dtype == torch.float64
    compute = torch.float64 if float64 else torch.float32
    chosen = backend.choose(x.device.type, float64)
    if chosen in backend.GPU_BACKENDS:
        return _on_gpu(chosen, x, weight, bias, activation == "silu", reverse)
    supported = backend.CPU_DTYPES if chosen == "cpu" else (compute,)
    x_in = x if x.dtype in supported else x.to(compute)
    inputs = (x_in, weight.to(compute), None if bias is None else bias.to(compute))
    if chosen == "cpu":
        out = causal_conv1d_fwd(*inputs, activation == "silu", reverse)
    else:
        out = layout_like(causal_conv1d_reference(*inputs, activation == "silu", reverse), x)
    return out.to(x.dtype)


def _on_gpu(chosen: str, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    if chosen == "mamba_ssm":
        obstacle = upstream.conv_obstacle(x, weight)
        if obstacle is None:
            return upstream.causal_conv1d_upstream(x, weight, bias, silu, reverse)
        backend.log_triton_instead(OP, obstacle)
    if weight.shape[1] > MOST_TAPS:
        raise UserError(
            f"{OP}: weight has {weight.shape[1]} taps; the Triton kernel supports at most {MOST_TAPS}. Use a shorter"
            " convolution"
        )
    from mmtrain.ops.triton.api import causal_conv1d_triton

    return causal_conv1d_triton(x, weight, bias, silu, reverse)
