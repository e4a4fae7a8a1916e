"""Dropout by seeds: the same mask in C++ and in PyTorch, at the asked rate, and in the gradient."""

from __future__ import annotations

import pytest
import torch

from mmtrain.ops import keyed_dropout, scan_backend


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 31), (4, 20000)])
def test_the_mask_is_that_of_pytorch(shape: tuple[int, ...], isa: str) -> None:
    x = torch.randn(shape)
    seeds = torch.randint(-(2**31), 2**31, shape[:1], dtype=torch.int32)
    results = []
    for backend in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        with scan_backend(backend):
            y = keyed_dropout(leaf, seeds, 0.3)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found == 0, expected == 0)


def test_rate_scale_and_seeds() -> None:
    x = torch.ones(4, 100_000)
    seeds = torch.tensor([1, 1, 2, -5], dtype=torch.int32)
    y = keyed_dropout(x, seeds, 0.2)
    dropped = (y == 0).float().mean(1)
    # five standard deviations of a mean of 100,000
    assert (dropped - 0.2).abs().max() < 5 * (0.2 * 0.8 / 100_000) ** 0.5
    assert y.max().item() == pytest.approx(1.25)
    assert torch.equal(y[0], y[1])
    assert ((y[0] == 0) & (y[2] == 0)).float().mean().item() == pytest.approx(0.04, abs=0.005)


def test_any_number_of_threads_gives_the_same(threads: None) -> None:
    x, seeds = torch.randn(3, 30_000), torch.tensor([7, 8, 9], dtype=torch.int32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(keyed_dropout(x, seeds, 0.5))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
