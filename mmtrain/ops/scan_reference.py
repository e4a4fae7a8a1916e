"""The selective scan in plain PyTorch, one position after the other: the definition the kernels are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t·h_t + D u_t (Mamba's discretisation; paper section 2).

    Args:
        u, delta: (Bt, D, L), one float dtype.
        A: (D, N).
        B, C: (Bt, G, N, L); group g serves channels g·D/G to (g+1)·D/G - 1.
        D, delta_bias: (D,) or None.
        initial_state: (Bt, D, N) or None for zeros.
        delta_softplus: Δ = softplus(delta + delta_bias) instead of delta + delta_bias.
        reverse: run from the last position to the first.

    Returns:
        y (Bt, D, L) and the last state (Bt, D, N). Autograd keeps the state of every position: memory Bt·D·L·N.
    """
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    batch, channels, length = u.shape
    groups = B.shape[1]
    # Channels by group, so that B and C broadcast over the channels of theirs: (Bt, G, D/G, ...).
    A = A.reshape(groups, channels // groups, -1)
    delta_t = delta.reshape(batch, groups, -1, length).unbind(-1)
    delta_u_t = (delta * u).reshape(batch, groups, -1, length).unbind(-1)
    B_t, C_t = B.unbind(-1), C.unbind(-1)
    h = u.new_zeros(batch, *A.shape) if initial_state is None else initial_state.reshape(batch, *A.shape)
    y: list[Tensor] = [h] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(delta_t[t][..., None] * A)
        h = decay * h + delta_u_t[t][..., None] * B_t[t][:, :, None, :]
        y[t] = (h * C_t[t][:, :, None, :]).sum(-1)
    out = torch.stack(y, dim=-1).reshape(u.shape)
    return out if D is None else out + D[:, None] * u, h.reshape(batch, channels, -1)
