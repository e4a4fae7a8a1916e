"""The mixer of a grid in several orders, against position by position in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import Direction, scan_backend, selective_mix, selective_scan
from mmtrain.ops.arguments import NAMES, positions


def inputs(k: int, channels: int, length: int, state: int, channels_last: bool) -> tuple[Tensor, list[Tensor]]:
    """x (2, L, D), and x_proj, dt_proj, dt_bias, A and D of each of k directions in turn."""
    x = torch.randn(2, length, channels) if channels_last else torch.randn(2, channels, length).mT
    parameters: list[Tensor] = []
    for _ in range(k):
        parameters += [torch.randn(3 + 2 * state, channels) * channels**-0.5, torch.randn(channels, 3) * 3**-0.5]
        parameters += [torch.randn(channels), -torch.exp(torch.randn(channels, state) * 0.5), torch.randn(channels)]
    return x, parameters


def made_directions(parameters: list[Tensor], orders: tuple[str, ...]) -> list[Direction]:
    return [Direction(*parameters[5 * k : 5 * k + 5], order=order) for k, order in enumerate(orders)]


def by_hand(x: Tensor, parameters: list[Tensor], orders: tuple[str, ...], height: int) -> Tensor:
    """Every direction on copies in its own order, put back; their mean."""
    total = torch.zeros_like(x)
    for d in made_directions(parameters, orders):
        walk = positions((d.code,), height, x.shape[1] // height)[0]
        u = x[:, walk]
        low, B, C = F.linear(u, d.x_proj).split([d.dt_proj.shape[1], d.A.shape[1], d.A.shape[1]], -1)
        delta = F.linear(low, d.dt_proj)
        y = selective_scan(u.mT, delta.mT, d.A, B.mT, C.mT, d.D, delta_bias=d.dt_bias, delta_softplus=True)
        total = total.index_add(1, walk, y.mT)
    return total / len(orders)


@pytest.mark.parametrize("backend", ["cpu", "reference", "parallel"])
@settings(max_examples=20, deadline=None)
@given(
    orders=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    channels=st.integers(1, 40),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    state=st.integers(1, 9),
    channels_last=st.booleans(),
)
def test_matches_copies_in_every_order(
    backend: str, orders: list[str], channels: int, height: int, width: int, state: int, channels_last: bool
) -> None:
    x, parameters = inputs(len(orders), channels, height * width, state, channels_last)
    leaves, doubles = (
        [t.detach().to(d).requires_grad_() for t in (x, *parameters)] for d in (torch.float32, torch.float64)
    )
    with scan_backend(backend):
        found = selective_mix(leaves[0], made_directions(leaves[1:], tuple(orders)), height=height)
    with scan_backend("reference"):
        expected = by_hand(doubles[0], doubles[1:], tuple(orders), height)
    weight = torch.randn(found.shape)
    values = [found, *torch.autograd.grad(found, leaves, weight)]
    exact = [expected, *torch.autograd.grad(expected, doubles, weight.double())]
    for i, (value, target) in enumerate(zip(values, exact, strict=True)):
        error = (value.double() - target).abs().max() / target.abs().max().clamp(min=1)
        assert error <= (1e-4 if i else 1e-5), (i, error)  # sums may cancel


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_stays_channels_last(channels_last: bool) -> None:
    x, parameters = inputs(4, 8, 30, 3, channels_last)
    x.requires_grad_()
    found = selective_mix(x, made_directions(parameters, NAMES), height=6)
    assert (found if channels_last else found.mT).is_contiguous()
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert (dx if channels_last else dx.mT).is_contiguous()


def test_bad_input_names_the_argument() -> None:
    x, parameters = inputs(4, 8, 30, 3, True)
    directions = made_directions(parameters, NAMES)
    with pytest.raises(UserError, match=r"x has shape \(8,\)"):
        selective_mix(x[0, 0], directions, height=6)
    with pytest.raises(UserError, match=r"height=7 must .* divide the 30 positions"):
        selective_mix(x, directions, height=7)
    with pytest.raises(UserError, match=r"directions\[3\].A has shape .*D = 8"):
        selective_mix(x, [*directions[:3], directions[3]._replace(A=directions[3].A[0])], height=6)
    with pytest.raises(UserError, match=r"directions\[0\].x_proj has shape"):
        selective_mix(x, [directions[0]._replace(x_proj=directions[0].x_proj[:2]), *directions[1:]], height=6)
    with pytest.raises(UserError, match=r"unknown order 'diagonal'"):
        selective_mix(x, [directions[0]._replace(order="diagonal")], height=6)
