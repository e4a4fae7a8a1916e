"""Reference implementations in plain PyTorch for any device, and a parallel scan for exported models.

The kernels are tested against ``selective_scan_reference``, which runs position by position, and
``causal_conv1d_reference``, which calls ``F.conv1d``.

``selective_scan_parallel`` is an associative scan. Two steps of h_t = a_t h_{t-1} + b_t compose to a step of the same
form: (a_1, b_1) followed by (a_2, b_2) is (a_2 a_1, a_2 b_1 + b_2), and this composition is associative (Blelloch 1990;
Martin and Cundy, arXiv 1709.04057). Each position is combined with the positions 1, 2, 4, … before it (Hillis and
Steele 1986). This takes log2 L rounds of four operators, the smallest number among associative scans, so exported
graphs are small. Decays are multiplied and never used as divisors, so a product that underflows to 0 is correct.

The positions are divided into chunks, which run one after the other and are recomputed in the backward pass. Memory
contains the states of only one chunk at a time. The number of operators depends only on the shapes, and there is no
data-dependent control flow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmtrain.ops.arguments import ScanInputs, wants_gradients


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Compute ``causal_conv1d`` by ``F.conv1d`` on the padded input. All tensors have one dtype."""
    channels, width = weight.shape
    padded = F.pad(x, (0, width - 1) if reverse else (width - 1, 0))
    kernel = weight.flip(1) if reverse else weight
    out = F.conv1d(padded, kernel[:, None], bias, groups=channels)
    return F.silu(out) if silu else out


def _steps(inputs: ScanInputs) -> Tensor:
    """Return the step sizes Δ (Bt, D, L)."""
    delta = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias[:, None]
    return F.softplus(delta) if inputs.delta_softplus else delta


def selective_scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t·h_t + D u_t position by position.

    This is Mamba's discretisation (paper, section 2). The gate is not applied. Autograd saves the state of every
    position, Bt·D·L·N elements.

    Args:
        inputs: tensors of one float dtype. Group g of B and C belongs to channels g·D/G to (g+1)·D/G - 1.

    Returns:
        y (Bt, D, L) and the last state (Bt, D, N).
    """
    u, delta, (batch, channels, length) = inputs.u, _steps(inputs), inputs.u.shape
    groups = inputs.B.shape[1]
    # (Bt, G, D/G, ...), so that B and C broadcast over the channels of their group.
    A = inputs.A.reshape(groups, channels // groups, -1)
    by_group = (batch, groups, channels // groups, length)  # without -1, which is ambiguous for an empty batch
    delta_t = delta.reshape(by_group).unbind(-1)
    delta_u_t = (delta * u).reshape(by_group).unbind(-1)
    B_t, C_t = inputs.B.unbind(-1), inputs.C.unbind(-1)
    initial = inputs.initial_state
    h = u.new_zeros(batch, *A.shape) if initial is None else initial.reshape(batch, *A.shape)
    y: list[Tensor] = [h] * length
    for t in reversed(range(length)) if inputs.reverse else range(length):
        decay = torch.exp(delta_t[t][..., None] * A)
        h = decay * h + delta_u_t[t][..., None] * B_t[t][:, :, None, :]
        y[t] = (h * C_t[t][:, :, None, :]).sum(-1)
    out = torch.stack(y, dim=-1).reshape(u.shape)
    return out if inputs.D is None else out + inputs.D[:, None] * u, h.reshape(batch, *inputs.A.shape)


#: Positions in a chunk. Memory contains Bt·CHUNK·D·N states, and an exported graph contains ⌈L/CHUNK⌉ chunks.
CHUNK = 128


def linear_recurrence(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """Compute h_t = a_t h_{t-1} + b_t along dimension 1 by an associative scan.

    Args:
        a, b: (Bt, L, ...), L >= 1, of one shape.
        initial: h_{-1} (Bt, 1, ...), or None for zeros.

    Returns:
        h at all positions, (Bt, L, ...).
    """
    if b.shape[1] == 1:  # also without an initial state, so that a always has a gradient
        return torch.addcmul(b, a, torch.zeros_like(b) if initial is None else initial)
    if initial is not None:
        b = torch.cat([torch.addcmul(b[:, :1], a[:, :1], initial), b[:, 1:]], 1)
    length, shift = b.shape[1], 1
    features = (0, 0) * (b.dim() - 2)
    while shift < length:
        # a_t and b_t describe the last `shift` steps up to t; after this round, the last 2 `shift` steps.
        later = (*features, shift, -shift)
        b = torch.addcmul(b, a, F.pad(b, later))
        shift *= 2
        if shift < length:
            a = a * F.pad(a, later)
    return b


def _chunk(h: Tensor | None, delta: Tensor, delta_u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Scan one chunk of n positions from state h (Bt, 1, G, D/G, N), None for zeros.

    Returns:
        y (Bt, n, G, D/G) and the state at the end of the chunk.
    """
    decay = torch.exp(delta[..., None] * A)
    states = linear_recurrence(decay, delta_u[..., None] * B[..., None, :], h)
    # Copy the last state: a view would keep the states of the whole chunk in memory.
    return torch.matmul(states, C[..., None]).squeeze(-1), states[:, -1:].clone()


def selective_scan_parallel(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`selective_scan_reference` in log2 L rounds, with the same arguments and results."""
    u, delta = inputs.u, _steps(inputs)
    groups, length = inputs.B.shape[1], u.shape[2]
    A = inputs.A.unflatten(0, (groups, -1))
    # (Bt, L, G, D/G): with positions before channels, the slices of the recurrence are contiguous blocks.
    per_channel = [t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (delta, delta * u)]
    sequences = [*per_channel, *(t.permute(0, 3, 1, 2) for t in (inputs.B, inputs.C))]
    if inputs.reverse:
        sequences = [t.flip(1) for t in sequences]
    initial = inputs.initial_state
    h = None if initial is None else initial.reshape(u.shape[0], 1, *A.shape)
    keep_inputs_only = length > CHUNK and not torch.compiler.is_exporting() and wants_gradients(A, *sequences, h)
    parts = []
    # split instead of slices: the gradient of each slice would be a tensor of zeros for the whole sequence
    for delta_c, delta_u_c, B_c, C_c in zip(*(t.split(CHUNK, 1) for t in sequences), strict=True):
        args = (h, delta_c, delta_u_c, A, B_c, C_c)
        if keep_inputs_only:
            y, h = checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = _chunk(*args)
        parts.append(y)
    out = torch.cat(parts, 1)
    if inputs.reverse:
        out = out.flip(1)
    out = out.flatten(2).transpose(1, 2)
    assert h is not None
    return out if inputs.D is None else out + inputs.D[:, None] * u, h.reshape(u.shape[0], *inputs.A.shape)
