"""What the dispatcher calls: the Triton kernels under the signatures that every backend of a CUDA tensor has.

Imports Triton; ``mmtrain.ops`` imports this module only when a tensor asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmtrain.ops.arguments import ScanInputs, wants_gradients
from mmtrain.ops.triton.operators import causal_conv1d_triton_fwd, directional_scan_fwd


def _unsqueezed(tensor: Tensor | None, dim: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(dim)


def selective_scan_triton(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """One scan along the sequence.

    Args:
        inputs: u, delta and z float32, bfloat16 or float16 in any strides (channels-last is read in place); at most
            256 states; B and C (Bt, G, N, L).

    Returns:
        out (Bt, D, L), dtype and layout of u, and the state after the last position walked, (Bt, D, N) float32.
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
    """K scans over one grid of height × width positions, each in its own order, and the sum of their results.

    Args:
        u: (Bt, 1 or K, D, L), L = height · width; 1: all directions read the same.
        delta: (Bt, K, D, L). Every tensor's positions are numbered row by row, whatever the order of the scan.
        A: (K, D, N) float32, N <= 256.
        B, C: (Bt, K, N, L).
        D, delta_bias: (K, D).
        orders: K of 0 rows, 1 rows from the end, 2 columns, 3 columns from the end.

    Returns:
        (Bt, D, L), dtype and layout of u.
    """
    tensors = (u, delta, A.float(), B[:, :, None], C[:, :, None], D, delta_bias, None, None)
    save = wants_gradients(*tensors)
    out, _, _, _ = directional_scan_fwd(*tensors, delta_softplus, height, width, list(orders), save, False)
    return out


def causal_conv1d_triton(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Depthwise causal convolution, the arguments those of ``mmtrain.ops.causal_conv1d``.

    Args:
        x: (Bt, D, L), float32, bfloat16 or float16, any strides (channels-last is read in place).
        weight: (D, W), W <= 8; the last tap meets the current position.
        bias: (D,).
        silu: whether SiLU follows.
        reverse: anti-causal.

    Returns:
        (Bt, D, L), dtype and layout of x.
    """
    return causal_conv1d_triton_fwd(x, weight, bias, silu, reverse)
