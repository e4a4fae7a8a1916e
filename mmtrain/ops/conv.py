"""``causal_conv1d``: depthwise causal convolution along the sequence, through the same door as the scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend, gpu
from mmtrain.ops.checks import check_floats, check_shape, layout_like
from mmtrain.ops.cpu.conv import causal_conv1d_fwd

OP = "causal_conv1d"


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The definition, by ``F.conv1d`` on the padded input. Shapes as in :func:`causal_conv1d`, one dtype."""
    channels, width = weight.shape
    padded = F.pad(x, (0, width - 1) if reverse else (width - 1, 0))
    kernel = weight.flip(1) if reverse else weight
    out = F.conv1d(padded, kernel[:, None], bias, groups=channels)
    return F.silu(out) if silu else out


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
        weight: (D, K), any K >= 1; the last tap meets the current position.
        bias: (D,).
        activation: None or "silu", applied to the output.
        reverse: anti-causal; equals flip, convolution, flip along L.

    Returns:
        (Bt, D, L), dtype and memory layout of x. Sums are float32 (float64 if the input is).

    Raises:
        UserError: shapes, dtypes, devices or an activation that do not fit; a backend that cannot run.
    """
    check_floats(OP, "x", {"x": x, "weight": weight, "bias": bias})
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise UserError(f"{OP}: x has shape {tuple(x.shape)}, expected (batch, channels, positions)")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise UserError(f"{OP}: weight has shape {tuple(weight.shape)}, expected (D, K) with D = {channels} and K >= 1")
    if bias is not None:
        check_shape(OP, "bias", bias, (channels,), "(D,)")
    if activation not in (None, "silu"):
        raise UserError(f"{OP}: activation {activation!r} is neither None nor 'silu'")
    float64 = x.dtype == torch.float64
    compute = torch.float64 if float64 else torch.float32
    chosen = backend.choose(x.device.type, float64)
    if chosen in gpu.BACKENDS:
        return gpu.convolution(chosen, x, weight, bias, activation == "silu", reverse)
    as_it_is = backend.CPU_DTYPES if chosen == "cpu" else (compute,)
    x_in = x if x.dtype in as_it_is else x.to(compute)
    inputs = (x_in, weight.to(compute), None if bias is None else bias.to(compute))
    if chosen == "cpu":
        out = causal_conv1d_fwd(*inputs, activation == "silu", reverse)
    else:
        out = layout_like(causal_conv1d_reference(*inputs, activation == "silu", reverse), x)
    return out.to(x.dtype)
