"""Plain PyTorch on any device: the definitions that the kernels are tested against, and a scan that can be exported.

``selective_scan_reference`` runs position by position and ``causal_conv1d_reference`` calls ``F.conv1d``.

``selective_scan_parallel`` is an associative scan. Steps of h_t = a_t h_{t-1} + b_t compose to one of the same form,
(a_1, b_1) then (a_2, b_2) = (a_2 a_1, a_2 b_1 + b_2), and that composition is associative (Blelloch 1990; Martin and
Cundy, arXiv 1709.04057). Every position is joined with the one 1, 2, 4, … before it (Hillis and Steele 1986): log2 L
rounds of four operators, the fewest of the associative scans, which keeps an exported graph small. Decays are only
multiplied, never divided by, so a product that underflows to 0 is the right answer. The positions are cut into chunks
that run one after the other, and the backward pass computes each chunk again: only the states of one chunk are in
memory at a time. The number of operators depends on the shapes alone, and no control flow depends on data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmtrain.ops.arguments import ScanInputs, wants_gradients


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The definition, by ``F.conv1d`` on the padded input. Shapes as in ``causal_conv1d``, one dtype."""
    channels, width = weight.shape
    padded = F.pad(x, (0, width - 1) if reverse else (width - 1, 0))
    kernel = weight.flip(1) if reverse else weight
    out = F.conv1d(padded, kernel[:, None], bias, groups=channels)
    return F.silu(out) if silu else out


def _steps(inputs: ScanInputs) -> Tensor:
    """Δ (Bt, D, L)."""
    delta = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias[:, None]
    return F.softplus(delta) if inputs.delta_softplus else delta


def selective_scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t·h_t + D u_t (Mamba's discretisation; paper section 2).

    Args:
        inputs: of one float dtype; group g of B and C serves channels g·D/G to (g+1)·D/G - 1. The gate is not applied.

    Returns:
        y (Bt, D, L) and the last state (Bt, D, N). Autograd keeps the state of every position: memory Bt·D·L·N.
    """
    u, delta, (batch, channels, length) = inputs.u, _steps(inputs), inputs.u.shape
    groups = inputs.B.shape[1]
    # Channels by group, so that B and C broadcast over the channels of theirs: (Bt, G, D/G, ...).
    A = inputs.A.reshape(groups, channels // groups, -1)
    by_group = (batch, groups, channels // groups, length)  # no -1, which an empty batch leaves open
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


#: Positions a chunk: memory Bt·CHUNK·D·N at a time, and ⌈L/CHUNK⌉ copies of the chunk in an exported graph.
CHUNK = 128


def linear_recurrence(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along dimension 1, from h_{-1} = ``initial``.

    Args:
        a, b: (Bt, L, ...), L >= 1, of one shape.
        initial: (Bt, 1, ...), or None for zeros.

    Returns:
        All h, (Bt, L, ...).
    """
    if b.shape[1] == 1:  # with zeros too, so that a always has a gradient
        return torch.addcmul(b, a, torch.zeros_like(b) if initial is None else initial)
    if initial is not None:
        b = torch.cat([torch.addcmul(b[:, :1], a[:, :1], initial), b[:, 1:]], 1)
    length, shift = b.shape[1], 1
    features = (0, 0) * (b.dim() - 2)
    while shift < length:
        # before: a_t and b_t stand for the last `shift` steps up to t; after: for twice as many
        later = (*features, shift, -shift)
        b = torch.addcmul(b, a, F.pad(b, later))
        shift *= 2
        if shift < length:
            a = a * F.pad(a, later)
    return b


def _chunk(h: Tensor | None, delta: Tensor, delta_u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of n positions from state h (Bt, 1, G, D/G, N) or zeros: y (Bt, n, G, D/G) and the state at its end."""
    decay = torch.exp(delta[..., None] * A)
    states = linear_recurrence(decay, delta_u[..., None] * B[..., None, :], h)
    # a copy of the last state: a view would keep the states of the whole chunk
    return torch.matmul(states, C[..., None]).squeeze(-1), states[:, -1:].clone()


def selective_scan_parallel(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`selective_scan_reference` in log2 L steps, with the same arguments and results."""
    u, delta = inputs.u, _steps(inputs)
    groups, length = inputs.B.shape[1], u.shape[2]
    A = inputs.A.unflatten(0, (groups, -1))
    # Positions before channels, so that the slices of the recurrence are whole blocks; channels by group.
    per_channel = [t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (delta, delta * u)]
    sequences = [*per_channel, *(t.permute(0, 3, 1, 2) for t in (inputs.B, inputs.C))]
    if inputs.reverse:
        sequences = [t.flip(1) for t in sequences]
    initial = inputs.initial_state
    h = None if initial is None else initial.reshape(u.shape[0], 1, *A.shape)
    keep_inputs_only = length > CHUNK and not torch.compiler.is_exporting() and wants_gradients(A, *sequences, h)
    parts = []
    # split, not slices: the gradient of each slice would be a whole sequence of zeros
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
