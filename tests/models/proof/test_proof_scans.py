"""Causality in the gradient, and orders and windows that put every token back in its place."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer, SequenceMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer


def influence(module: nn.Module, x: Tensor, axis: int) -> Tensor:
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


def identity(self: S6, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x


def running_sum(self: S6, x: Tensor, reverse: bool = False) -> Tensor:
    return x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)


def convolved(mixer: ImageTokenMixer, x: Tensor) -> Tensor:
    u = mixer.in_proj(x).chunk(2, -1)[0]
    return F.silu(mixer.conv[0](u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


@given(height=st.integers(1, 20), width=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_the_cross_scan_restores_any_grid(height: int, width: int) -> None:
    """Sums of four equal numbers and a quarter are exact, and so is the comparison up to the convolution's rounding."""
    mixer, x = ImageTokenMixer(3), torch.randn(2, height, width, 3)
    with mock.patch.object(S6, "forward", identity), torch.no_grad():
        torch.testing.assert_close(merged(mixer, x), convolved(mixer, x))


@given(height=st.integers(1, 12), width=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_cross_scan_has_the_four_orders(height: int, width: int) -> None:
    """With running sums for S6 the orders are visible: rows down and up, columns right and left, each tapering."""
    mixer, x = ImageTokenMixer(3), torch.randn(2, height, width, 3)
    with mock.patch.object(S6, "forward", running_sum), torch.no_grad():
        found, grid = merged(mixer, x), convolved(mixer, x)
    # forward and reverse sums along one order: everything once, and the own element twice
    everything = grid.sum((1, 2), keepdim=True)
    expected = (2 * (everything + grid)) / 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("alive", "by_column", "turned"), [(i, i > 1, i % 2 == 1) for i in range(4)])
def test_each_scan_follows_its_own_order(alive: int, by_column: bool, turned: bool) -> None:
    """One direction alone, the other three silenced: row-major or column-major sums, from the front or the end."""
    mixer, x = ImageTokenMixer(3), torch.randn(2, 4, 6, 3)
    speaking = mixer.ssm[alive]

    def one_alone(self: S6, u: Tensor, reverse: bool = False) -> Tensor:
        return running_sum(self, u, reverse) if self is speaking else torch.zeros_like(u)

    with mock.patch.object(S6, "forward", one_alone), torch.no_grad():
        found, grid = merged(mixer, x), convolved(mixer, x)
    expected = torch.zeros_like(grid)
    total = torch.zeros_like(grid[:, 0, 0])
    rows, columns = range(grid.shape[1]), range(grid.shape[2])
    order = [(i, j) for j in columns for i in rows] if by_column else [(i, j) for i in rows for j in columns]
    for i, j in reversed(order) if turned else order:
        total = total + grid[:, i, j]
        expected[:, i, j] = total / 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(height=st.integers(1, 24), width=st.integers(1, 24), window=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_the_channel_mixers_windows_restore_any_grid(height: int, width: int, window: int) -> None:
    """S6 the identity and the convolutions' taps (0, …, 0, 1): then only the SiLU after them is left."""
    mixer, x = ImageChannelMixer(3, window=window), torch.randn(2, height, width, 3)
    with torch.no_grad():
        for conv in cast(Any, mixer.scans[0]).conv:
            conv.weight.zero_()
            conv.weight[..., -1] = 1
            conv.bias.zero_()
        with mock.patch.object(S6, "forward", identity):
            found = merged(mixer, x)
        torch.testing.assert_close(found, F.silu(mixer.in_proj(x).chunk(2, -1)[0]))
