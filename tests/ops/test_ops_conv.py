"""The causal convolution against ``F.conv1d`` in float64, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.ops import causal_conv1d, scan_backend


def make(batch: int, channels: int, length: int, width: int, channels_last: bool, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, channels, generator=generator).transpose(1, 2)
    x = x if channels_last else x.contiguous()
    weight = torch.randn(channels, width, generator=generator)
    bias = torch.randn(channels, generator=generator)
    return [t.requires_grad_() for t in (x, weight, bias)]


def expected_of(tensors: list[Any], silu: bool, reverse: bool, grad: Tensor) -> list[Tensor]:
    """Output and gradients by F.conv1d in float64: flipped, padded on the left, flipped back."""
    x, weight, bias = doubles = [t.detach().double().requires_grad_() for t in tensors]
    y = F.conv1d(
        F.pad(x.flip(-1) if reverse else x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1]
    )
    y = F.silu(y) if silu else y
    y = y.flip(-1) if reverse else y
    return [y, *torch.autograd.grad(y, doubles, grad.double())]


def compare(tensors: list[Any], silu: bool, reverse: bool) -> list[Tensor]:
    x, weight, bias = tensors
    y = causal_conv1d(x, weight, bias, "silu" if silu else None, reverse)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = [y, *torch.autograd.grad(y, tensors, grad)]
    floor = 1e-6 * y.numel() ** 0.5
    for name, a, b in zip(("y", "x", "weight", "bias"), found, expected_of(tensors, silu, reverse, grad), strict=True):
        tolerance = (1e-5 if name == "y" else 1e-4) * b.abs().max().item() + floor
        assert (a.double() - b).abs().max().item() <= tolerance, name
    return found


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 70])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_matches_float64_on_every_isa(width: int, channels_last: bool, reverse: bool, isa: str) -> None:
    for length in (1, 3, 64, 130):
        compare(make(2, 21, length, width, channels_last), True, reverse)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 70), st.integers(1, 300), st.integers(1, 9), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_matches_float64_for_any_shape(
    batch: int, channels: int, length: int, width: int, channels_last: bool, silu: bool, reverse: bool, seed: int
) -> None:
    tensors = make(batch, channels, length, width, channels_last, seed)
    y, dx, *_ = compare(tensors, silu, reverse)
    if channels > 1 and length > 1:
        assert y.stride() == dx.stride() == tensors[0].stride()


def test_reference_backend_matches_too() -> None:
    for channels_last in (False, True):
        for reverse in (False, True):
            tensors = make(2, 7, 20, 4, channels_last)
            with scan_backend("reference"):
                y, *_ = compare(tensors, True, reverse)
            assert y.stride() == tensors[0].stride()


def test_without_bias_and_low_precision() -> None:
    x, weight, _ = make(2, 5, 70, 4, True)
    y = causal_conv1d(x.bfloat16(), weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, causal_conv1d(x.bfloat16().float(), weight).bfloat16())
    (dx,) = torch.autograd.grad(causal_conv1d(x, weight).sum(), x)
    assert torch.allclose(dx[:, :, :-3], weight.sum(1)[:, None].expand(2, 5, 67), atol=1e-5)


def test_it_is_causal(isa: str) -> None:
    x, weight, bias = (t.detach() for t in make(1, 3, 100, 4, False))
    before = causal_conv1d(x, weight, bias, "silu")
    x[:, :, 70] = float("nan")
    touched = causal_conv1d(x, weight, bias, "silu").isnan()
    assert touched[..., 70:74].all()
    assert touched.sum() == 3 * 4
    assert torch.equal(causal_conv1d(x, weight, bias, "silu")[..., :70], before[..., :70])


def test_same_bits_for_any_number_of_threads(threads: None) -> None:
    tensors = make(9, 40, 150, 4, True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, weight, bias = tensors
        y = causal_conv1d(x, weight, bias, "silu")
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch() -> None:
    x, weight, bias = make(0, 5, 7, 4, False)
    y = causal_conv1d(x, weight, bias)
    assert y.shape == (0, 5, 7)
    assert torch.autograd.grad(y.sum(), weight)[0].abs().sum() == 0
