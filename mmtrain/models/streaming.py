"""The recurrent mode of a causal mixer: one position at a time, from a state of fixed size (Mamba, section 3.3).

A :class:`SequenceMixer` of one direction (TSM2's time mixer) is a causal convolution and a linear recurrence. The last
inputs of the convolution and the state of the S6 sum up what it has read, so a step costs the same after ten positions
as after a million.

    y, state = prefill(mixer, past)             # (B, L, dim), in parallel
    y_next, state = step(mixer, x_next, state)  # (B, dim)

A whole TSM2 cannot stream: its window normalisation, its 2-D normalisation over time and features and its head look at
the whole look-back, so one more observation changes every token. Call the model on the new window instead. The variate
mixer and the image mixers scan in two or more directions and have no such state either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.models.mixers import SequenceMixer
from mmtrain.models.s6 import S6
from mmtrain.ops import causal_conv1d
from mmtrain.ops.mix import scan_one


@dataclass(frozen=True)
class SequenceState:
    """What a causal mixer remembers. A step makes a new state and leaves the old one as it is.

    ``conv``: (B, E, K - 1), the last inputs of the convolution, oldest first (K taps; no elements without one).
    ``ssm``: (B, E, N), h of the S6. E is the width of the mixer. Both float32 unless :func:`start` was told otherwise.
    """

    conv: Tensor
    ssm: Tensor


def _parts(mixer: SequenceMixer) -> tuple[nn.Conv1d | None, S6]:
    """The one convolution and S6 of a causal mixer.

    Raises:
        ValueError: for a bidirectional mixer.
    """
    scan = mixer.scan
    if len(scan.ssm) != 1 or any(scan.reverse):
        raise ValueError(
            f"this {type(mixer).__name__} scans from the end as well: its output at a position depends on what comes "
            "later, so it has no recurrent mode. Stream a mixer made with bidirectional=False"
        )
    return (cast(nn.Conv1d, scan.conv[0]) if len(scan.conv) else None), cast(S6, scan.ssm[0])


def start(
    mixer: SequenceMixer, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> SequenceState:
    """The state before the first position: zeros. ``device`` defaults to the mixer's.

    Raises:
        ValueError: for a bidirectional mixer.
    """
    conv, s6 = _parts(mixer)
    width, states = s6.A_log.shape
    device = s6.A_log.device if device is None else device
    taps = conv.kernel_size[0] if conv is not None else 1
    return SequenceState(
        torch.zeros(batch, width, taps - 1, dtype=dtype, device=device),
        torch.zeros(batch, width, states, dtype=dtype, device=device),
    )


def step(mixer: SequenceMixer, x: Tensor, state: SequenceState) -> tuple[Tensor, SequenceState]:
    """One position: y of x, and the state after it. Equals the full forward at that position.

    Args:
        x: (B, dim).

    Returns:
        y (B, dim) in the dtype of the mixer's projections, and the new state.

    Raises:
        ValueError: for a bidirectional mixer, or shapes that do not fit the mixer and the state.
    """
    conv, s6 = _parts(mixer)
    if x.ndim != 2 or x.shape != (state.ssm.shape[0], mixer.in_proj.in_features):
        raise ValueError(
            f"x has shape {tuple(x.shape)}: a step takes one position, "
            f"({state.ssm.shape[0]} sequences of the state, {mixer.in_proj.in_features} features)"
        )
    dtype = state.ssm.dtype
    u, gate = mixer.in_proj(x).chunk(2, dim=-1)
    window = state.conv
    if conv is not None:
        seen = torch.cat([state.conv, u[..., None].to(dtype)], -1)
        window = seen[..., 1:]
        summed = (seen * conv.weight.squeeze(1).to(dtype)).sum(-1)
        u = F.silu(summed if conv.bias is None else summed + conv.bias.to(dtype)).to(u.dtype)
    low_rank, b, c = s6.x_proj(u).split([s6.rank, s6.state, s6.state], dim=-1)
    delta = F.softplus(F.linear(low_rank, s6.dt_proj.weight).to(dtype) + s6.dt_proj.bias.to(dtype))
    decay = torch.exp(delta[..., None] * -torch.exp(s6.A_log.to(dtype)))
    h = decay * state.ssm + (delta * u.to(dtype))[..., None] * b[:, None, :].to(dtype)
    y = (h * c[:, None, :].to(dtype)).sum(-1) + s6.D.to(dtype) * u.to(dtype)
    return mixer.out_proj(y.to(u.dtype) * F.silu(gate)), SequenceState(window, h)


def prefill(mixer: SequenceMixer, x: Tensor) -> tuple[Tensor, SequenceState]:
    """The full forward of a prefix, and the state to go on from with :func:`step`.

    Args:
        x: (B, L, dim), L >= 1.

    Returns:
        y (B, L, dim), equal to ``SequenceMixer.forward``, and the state after position L.

    Raises:
        ValueError: for a bidirectional mixer or another shape of x.
    """
    conv, s6 = _parts(mixer)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != mixer.in_proj.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}: give sequences (B, L, {mixer.in_proj.in_features})")
    empty = start(mixer, x.shape[0], device=x.device)
    u, gate = mixer.in_proj(x).chunk(2, dim=-1)
    window = empty.conv
    if conv is not None:
        taps = conv.kernel_size[0]
        window = torch.cat([empty.conv, u[:, max(0, u.shape[1] - taps + 1) :].mT.to(empty.conv.dtype)], -1)
        window = window[..., window.shape[-1] - taps + 1 :]
        u = causal_conv1d(u.mT, conv.weight.squeeze(1), conv.bias, activation="silu").mT
    y, last = scan_one(u, s6())
    return mixer.out_proj(y * F.silu(gate)), SequenceState(window, last)
