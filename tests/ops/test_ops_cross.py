"""The scan of a grid in several orders, against position by position in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import cross_selective_scan, scan_backend, selective_scan
from mmtrain.ops.orders import NAMES, positions


def inputs(k: int, channels: int, height: int, width: int, state: int, channels_last: bool, full: bool) -> list[Tensor]:
    def grid(*shape: int) -> Tensor:
        made = torch.randn(*shape, height, width)
        return made.movedim(-3, -1).contiguous().movedim(-1, -3) if channels_last else made

    tensors = [grid(2, channels), grid(2, k, channels), -torch.exp(torch.randn(k, channels, state) * 0.5)]
    tensors += [grid(2, k, state), grid(2, k, state)]
    return tensors + ([torch.randn(k, channels), torch.randn(k, channels)] if full else [])


def by_hand(tensors: list[Tensor], orders: tuple[str, ...]) -> Tensor:
    """Every direction on copies in its own order, put back."""
    u, delta, A, B, C, *rest = tensors
    height, width = u.shape[2:]
    total = torch.zeros_like(u).flatten(2)
    for k, order in enumerate(orders):
        walk = positions((NAMES.index(order),), height, width)[0]
        parts = [t.flatten(-2)[..., walk] for t in (u, delta[:, k], B[:, k], C[:, k])]
        D, bias = (t[k] for t in rest) if rest else (None, None)
        y = selective_scan(parts[0], parts[1], A[k], parts[2], parts[3], D, delta_bias=bias, delta_softplus=True)
        total = total.index_add(2, walk, y)
    return total.view(u.shape)


@pytest.mark.parametrize("backend", ["cpu", "reference", "parallel"])
@settings(max_examples=20, deadline=None)
@given(
    orders=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    channels=st.integers(1, 40),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    state=st.integers(1, 9),
    channels_last=st.booleans(),
    full=st.booleans(),
)
def test_matches_copies_in_every_order(
    backend: str,
    orders: list[str],
    channels: int,
    height: int,
    width: int,
    state: int,
    channels_last: bool,
    full: bool,
) -> None:
    tensors = inputs(len(orders), channels, height, width, state, channels_last, full)
    leaves, doubles = ([t.detach().to(d).requires_grad_() for t in tensors] for d in (torch.float32, torch.float64))
    with scan_backend(backend):
        found = cross_selective_scan(*leaves, delta_softplus=True, orders=orders)
    with scan_backend("reference"):
        expected = by_hand(doubles, tuple(orders))
    weight = torch.randn(found.shape)
    values = [found, *torch.autograd.grad(found, leaves, weight)]
    exact = [expected, *torch.autograd.grad(expected, doubles, weight.double())]
    for i, (value, target) in enumerate(zip(values, exact, strict=True)):
        error = (value.double() - target).abs().max() / target.abs().max().clamp(min=1)
        assert error <= (1e-4 if i else 1e-5), (i, error)  # sums may cancel


def test_channels_last_stays_channels_last() -> None:
    tensors = inputs(4, 8, 6, 5, 3, True, True)
    tensors[0].requires_grad_()
    found = cross_selective_scan(*tensors, delta_softplus=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    (du,) = torch.autograd.grad(found.sum(), tensors[0])
    assert du.is_contiguous(memory_format=torch.channels_last)


def test_bad_input_names_the_argument() -> None:
    u, delta, A, B, C, D, bias = inputs(4, 8, 6, 5, 3, False, True)
    with pytest.raises(UserError, match=r"u has shape \(8, 6, 5\)"):
        cross_selective_scan(u[0], delta, A, B, C)
    with pytest.raises(UserError, match=r"delta has shape .*, expected \(batch, directions, channels, H, W\)"):
        cross_selective_scan(u, delta[:, :3], A, B, C)
    with pytest.raises(UserError, match=r"A has shape .*K = 4 and D = 8"):
        cross_selective_scan(u, delta, A[0], B, C)
    with pytest.raises(UserError, match=r"C has shape"):
        cross_selective_scan(u, delta, A, B, C[..., :2])
    with pytest.raises(UserError, match=r"order 'diagonal' is none of"):
        cross_selective_scan(u, delta, A, B, C, D, bias, orders=["diagonal"])
