"""Kernels for CUDA tensors: mamba-ssm's and causal-conv1d's where they are asked for and can, ours in Triton elsewhere.

Triton is imported by the first call.
"""

from __future__ import annotations

import logging

from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend, upstream

BACKENDS = ("triton", "mamba_ssm")
#: Of the Triton kernels (mmtrain/ops/triton).
MOST_STATES, MOST_TAPS = 256, 8


def scan(
    chosen: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One scan, the arguments those of ``selective_scan`` with B and C (Bt, G, N, L): out and the last state."""
    rest = (D, z, delta_bias, delta_softplus, reverse, initial_state)
    if chosen == "mamba_ssm":
        obstacle = upstream.obstacle(u, A, B, initial_state, delta)
        if obstacle is None:
            return upstream.selective_scan_upstream(u, delta, A, B, C, *rest)
        _tell("scan", obstacle)
    if A.shape[1] > MOST_STATES:
        raise UserError(f"selective_scan: A has {A.shape[1]} states, the Triton kernel takes up to {MOST_STATES}")
    from mmtrain.ops.triton.api import selective_scan_triton

    return selective_scan_triton(u, delta, A, B, C, *rest)


def convolution(chosen: str, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """``causal_conv1d``."""
    if chosen == "mamba_ssm":
        obstacle = upstream.conv_obstacle(x, weight)
        if obstacle is None:
            return upstream.causal_conv1d_upstream(x, weight, bias, silu, reverse)
        _tell("conv", obstacle)
    if weight.shape[1] > MOST_TAPS:
        raise UserError(f"causal_conv1d: weight has {weight.shape[1]} taps, the Triton kernel takes up to {MOST_TAPS}")
    from mmtrain.ops.triton.api import causal_conv1d_triton

    return causal_conv1d_triton(x, weight, bias, silu, reverse)


def _tell(which: str, obstacle: str) -> None:
    name = {"scan": "selective_scan", "conv": "causal_conv1d"}[which]
    if not backend.has_triton():
        raise UserError(f"{name}: {obstacle}, and Triton is not installed; cure: {backend.TRITON_CURE}")
    backend.tell_once(f"{which}: {obstacle}", logging.INFO, f"{name}: our Triton kernel, since {obstacle}")
