"""The functions through which ``mmtrain.ops`` calls the Triton kernels.

This module imports Triton, so ``mmtrain.ops`` imports it only when a Triton kernel is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmtrain.ops.arguments import ScanInputs, wants_gradients
from mmtrain.ops.triton.operators import causal_conv1d_triton_fwd, directional_scan_fwd


def _unsqueezed(tensor: Tensor | None, dim: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(dim)


def selective_scan_triton(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run ``selective_scan`` on a GPU.

    Args:
        inputs: u, delta and z in float32, bfloat16 or float16 with any strides (channels-last is read without a copy);
            B and C (Bt, G, N, L) with N <= 256.

    Returns:
        out (Bt, D, L) with the dtype and layout of u, and the state after the last position of the recurrence,
        (Bt, D, N) float32.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, initial_state = inputs
    tensors = (
        u[:, None],
        delta[:, None],
        A[None].float(),
        B[:, None],
        C[:, None],
        _unsqueezed(D, 0),
        _unsqueezed(delta_bias, 0),
        z,
        _unsqueezed(initial_state, 1),
    )
    save = wants_gradients(*tensors)
    out, last, _, _ = directional_scan_fwd(*tensors, delta_softplus, 1, u.shape[-1], [int(reverse)], save, True)
    return out, last[:, 0]


def directional_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    height: int,
    width: int,
    orders: Sequence[int],
) -> Tensor:
    """Return the sum of K scans over a grid of height × width positions, each with its own order.

    In all tensors positions are numbered row by row, for any order of the scan.

    Args:
        u: (Bt, K, D, L) with L = height · width, or (Bt, 1, D, L) if all directions have the same input.
        delta: (Bt, K, D, L).
        A: (K, D, N) float32, N <= 256.
        B, C: (Bt, K, N, L).
        D, delta_bias: (K, D).
        orders: K codes: 0 rows, 1 rows reversed, 2 columns, 3 columns reversed.

    Returns:
        (Bt, D, L) with the dtype and layout of u.
    """
    tensors = (u, delta, A.float(), B[:, :, None], C[:, :, None], D, delta_bias, None, None)
    save = wants_gradients(*tensors)
    out, _, _, _ = directional_scan_fwd(*tensors, delta_softplus, height, width, list(orders), save, False)
    return out


def causal_conv1d_triton(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Run ``mmtrain.ops.causal_conv1d`` on a GPU.

    Args:
        x: (Bt, D, L), float32, bfloat16 or float16, any strides (channels-last is read without a copy).
        weight: (D, W), W <= 8. The last tap multiplies the current position.
        bias: (D,).
        silu: apply SiLU to the output.
        reverse: anti-causal convolution.

    Returns:
        (Bt, D, L) with the dtype and layout of x.
    """
    return causal_conv1d_triton_fwd(x, weight, bias, silu, reverse)
