"""The recurrent mode of a causal mixer, which processes one position at a time (Mamba, section 3.3).

A :class:`SequenceMixer` of one direction (TSM2's time mixer) is a causal convolution followed by a linear recurrence.
Its state has a fixed size: the last inputs of the convolution and the state of the S6. So the cost of a step does not
depend on the number of earlier positions.

    y, state = prefill(mixer, past)             # (B, L, dim), in parallel
    y_next, state = step(mixer, x_next, state)  # (B, dim)

A complete TSM2 has no recurrent mode: its window normalisation, its 2-D normalisation and its head depend on the whole
lookback, so one more observation changes every token. Call the model on the new window instead. The variate mixer and
the image mixers have no recurrent mode either, because they scan in two or more directions.
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
    """The state of a causal mixer of width E. A step returns a new state and does not change the old one.

    Attributes:
        conv: (B, E, K - 1) last inputs of the convolution with K taps, oldest first. Empty without a convolution.
        ssm: (B, E, N) state of the S6. Both are float32 unless :func:`start` was called with another dtype.
    """

    conv: Tensor
    ssm: Tensor


def _parts(mixer: SequenceMixer) -> tuple[nn.Conv1d | None, S6]:
    """Return the convolution (or None) and the S6 of a causal mixer.

    Raises:
        ValueError: for a bidirectional mixer.
    """
    scan = mixer.scan
    if len(scan.ssm) != 1 or any(scan.reverse):
        raise ValueError(
            f"this {type(mixer).__name__} is bidirectional: its output at a position depends on later positions, so "
            "it has no recurrent mode. Use a mixer with bidirectional=False"
        )
    return (cast(nn.Conv1d, scan.conv[0]) if len(scan.conv) else None), cast(S6, scan.ssm[0])


def start(
    mixer: SequenceMixer, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> SequenceState:
    """Return the state before the first position, zeros.

    Args:
        batch: number of sequences.
        device: default: the device of the mixer.

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
    """Process one position. The result equals that of ``SequenceMixer.forward`` at this position.

    Args:
        x: (B, dim) input at the position.
        state: the state before the position.

    Returns:
        y (B, dim) in the dtype of the mixer's projections, and the new state.

    Raises:
        ValueError: for a bidirectional mixer, or shapes that do not fit the mixer and the state.
    """
    conv, s6 = _parts(mixer)
    if x.ndim != 2 or x.shape != (state.ssm.shape[0], mixer.in_proj.in_features):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected one position, "
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
    """Process a prefix in parallel, and return the state from which :func:`step` continues.

    Args:
        x: (B, L, dim), L >= 1.

    Returns:
        y (B, L, dim), equal to ``SequenceMixer.forward``, and the state after position L.

    Raises:
        ValueError: for a bidirectional mixer, or if the shape of x does not fit.
    """
    conv, s6 = _parts(mixer)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != mixer.in_proj.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, {mixer.in_proj.in_features}) with L >= 1")
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
