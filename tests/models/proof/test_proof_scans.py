"""Causality in the gradient, and orders and windows that put every token back in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer, SequenceMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer


def influence(module: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """(L, L): largest |∂(w·y)_t/∂x_s| of position t of the output (random w) by position s of the input."""
    x = x.requires_grad_()
    y = module(x)
    weight = torch.randn_like(y)
    rows = []
    for t in range(x.shape[axis]):
        (found,) = torch.autograd.grad((y * weight).select(axis, t).sum(), x, retain_graph=True)
        rows.append(found.abs().amax(dim=[d for d in range(x.ndim) if d != axis]))
    return torch.stack(rows)


@given(length=st.integers(1, 40), dim=st.integers(1, 24), variates=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_time_mixer_is_causal(length: int, dim: int, variates: int) -> None:
    """No tolerance: what is later is never multiplied in, so its gradient is exactly 0."""
    found = influence(TimeMixer(dim), torch.randn(2, variates, length, dim), axis=2)
    assert (found.triu(1) == 0).all()
    assert (found.diagonal() > 0).all()
    if length > 1:  # beyond the reach of the convolution too, it is a recurrence
        assert (found[-1] > 0).all()


@given(length=st.integers(2, 40), dim=st.integers(2, 24))
@settings(max_examples=10, deadline=None)
def test_two_directions_reach_everywhere(length: int, dim: int) -> None:
    found = influence(SequenceMixer(dim, bidirectional=True), torch.randn(2, length, dim), axis=1)
    assert (found > 0).all()


def merged(mixer: ImageTokenMixer | ImageChannelMixer, x: Tensor) -> Tensor:
    """What ``mixer`` feeds to the norm before its gate: the scans' outputs, put back in place and averaged."""
    seen: list[Tensor] = []
    handle = mixer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        mixer(x)
    finally:
        handle.remove()
    return seen[0]


def silence(*scans: S6) -> None:
    """C = 0 and D = 1: a scan returns its input."""
    with torch.no_grad():
        for ssm in scans:
            ssm.x_proj.weight[-ssm.state :] = 0


def convolved(mixer: ImageTokenMixer, x: Tensor) -> Tensor:
    u = mixer.in_proj(x).chunk(2, -1)[0]
    return F.silu(mixer.conv[0](u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


@given(height=st.integers(1, 20), width=st.integers(1, 20), fused=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_cross_scan_restores_any_grid(height: int, width: int, fused: bool) -> None:
    """Sums of four equal numbers and a quarter are exact, and so is the comparison up to the convolution's rounding."""
    mixer, x = ImageTokenMixer(3), torch.randn(2, height, width, 3)
    silence(*mixer.ssm)
    with torch.no_grad(), patch.dict(os.environ, MMTRAIN_FUSE=str(int(fused))):
        torch.testing.assert_close(merged(mixer, x), convolved(mixer, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("alive", "by_column", "turned"), [(i, i > 1, i % 2 == 1) for i in range(4)])
def test_each_scan_follows_its_own_order(alive: int, by_column: bool, turned: bool, fused: bool) -> None:
    """One direction alone, the others silenced: a place is reached from those before it in that order, no others."""
    mixer, (height, width) = ImageTokenMixer(3), (4, 6)
    silence(*(ssm for i, ssm in enumerate(mixer.ssm) if i != alive))

    def scan(x: Tensor) -> Tensor:
        return mixer._scan([x.view(2, height, width, -1)]).flatten(1, 2)

    with patch.dict(os.environ, MMTRAIN_FUSE=str(int(fused))):
        found = influence(scan, torch.randn(2, height * width, 6), axis=1)
    rows, columns = range(height), range(width)
    order = [i * width + j for j in columns for i in rows] if by_column else list(range(height * width))
    order = order[::-1] if turned else order
    in_order = found[order][:, order]
    assert (in_order.triu(1) == 0).all()
    assert (in_order.tril() > 0).sum() == in_order.numel() / 2 + len(order) / 2


@given(height=st.integers(1, 24), width=st.integers(1, 24), window=st.integers(1, 8), fused=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_channel_mixers_windows_restore_any_grid(height: int, width: int, window: int, fused: bool) -> None:
    """S6 the identity and the convolutions' taps (0, …, 0, 1): then only the SiLU after them is left."""
    mixer, x = ImageChannelMixer(3, window=window), torch.randn(2, height, width, 3)
    with torch.no_grad(), patch.dict(os.environ, MMTRAIN_FUSE=str(int(fused))):
        for conv in cast(Any, mixer.scans[0]).conv:
            conv.weight.zero_()
            conv.weight[..., -1] = 1
            conv.bias.zero_()
        silence(*cast(Any, mixer.scans[0]).ssm)
        torch.testing.assert_close(merged(mixer, x), F.silu(mixer.in_proj(x).chunk(2, -1)[0]))
