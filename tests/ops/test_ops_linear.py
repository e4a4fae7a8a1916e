"""Matrix products by oneDNN, and weighted sums: against torch, with gradients, chosen and overridden as told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import linear, scan_backend, weighted_sum
from mmtrain.ops.cpu import library
from mmtrain.ops.dense import _transposed_product, _uses_onednn


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_LINEAR", "onednn")


def operator(*tensors: Tensor) -> str:
    """The operator that makes the product, under the view that gives it its shape."""
    node = linear(*tensors).grad_fn
    assert node is not None
    name = type(node).__name__
    return type(node.next_functions[0][0]).__name__ if name.startswith("View") else name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inside", "out"), [((300,), 64, 40), ((7, 60), 40, 64), ((2, 3, 100), 96, 32), ((5000,), 32, 200)]
)
def test_gradients_are_those_of_float64(rows: tuple[int, ...], inside: int, out: int, bias: bool, onednn: None) -> None:
    x, weight = torch.randn(*rows, inside), torch.randn(out, inside)
    tensors = [x, weight, *([torch.randn(out)] if bias else [])]
    dy = torch.randn(*rows, out)
    leaves, doubles = ([t.to(dtype).requires_grad_() for t in tensors] for dtype in (torch.float32, torch.float64))
    y, exact = linear(*leaves), torch.nn.functional.linear(*doubles)
    found, expected = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(exact, doubles, dy.double())
    assert "linear_fwd" in operator(*leaves)
    for value, target in zip((y, *found), (exact, *expected), strict=True):
        assert value.is_contiguous()
        assert (value.double() - target).abs().max() <= 1e-5 * target.abs().max()


def test_the_weights_gradient_does_not_depend_on_threads(threads: None) -> None:
    a, b = torch.randn(5000, 200), torch.randn(5000, 32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(_transposed_product(a, b))
    if library.loaded().isa == "avx512":
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], a.T @ b, rtol=1e-4, atol=1e-2)


def test_only_what_is_wanted_is_computed(onednn: None) -> None:
    x, weight = torch.randn(300, 64), torch.randn(40, 64)
    (dx,) = torch.autograd.grad(linear(x.requires_grad_(), weight).sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(300, 64))
    x = x.detach()
    linear(x, weight.requires_grad_()).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(40, 64), rtol=1e-4, atol=1e-4)


def test_small_and_narrow_products_are_torchs(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.randn(300, 64).requires_grad_(), torch.randn(40, 64)
    assert "linear_fwd" in operator(*large)
    assert "linear_fwd" not in operator(torch.randn(3, 64).requires_grad_(), large[1])
    assert "linear_fwd" not in operator(large[0].double(), large[1].double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*large).dtype == torch.bfloat16
    with scan_backend("parallel"):  # plain torch, as it is exported
        assert "linear_fwd" not in operator(*large)
    monkeypatch.setenv("MMTRAIN_LINEAR", "torch")
    assert "linear_fwd" not in operator(*large)


def test_the_choice_is_by_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for processor, expected in (
        ("AuthenticAMD avx512", True),
        ("GenuineIntel avx512", False),
        ("AuthenticAMD avx2", False),
        ("", False),
    ):
        _uses_onednn.cache_clear()
        monkeypatch.setattr("mmtrain.ops.dense._processor", lambda found=processor: found)
        assert _uses_onednn("auto") is expected, processor
    _uses_onednn.cache_clear()


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_LINEAR", "mkl")
    with pytest.raises(UserError, match="MMTRAIN_LINEAR='mkl': must be one of auto, torch, onednn"):
        linear(torch.randn(300, 64), torch.randn(40, 64))


@pytest.mark.parametrize("shape", [(3,), (2, 5000, 3), (4096,)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_weighted_sums_are_those_of_float64(shape: tuple[int, ...], count: int, isa: str) -> None:
    tensors, weight = [torch.randn(shape) for _ in range(count)], torch.randn(count)
    dout = torch.randn(shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (*tensors, weight)]
        out = weighted_sum(leaves[:-1], leaves[-1])
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    assert "weighted_sum" in type(results[0][0].grad_fn).__name__
    for value, exact in zip(*results, strict=True):
        # the gradient of a weight is a sum of as many terms as there are elements, which may cancel
        floor = 1e-6 * dout.numel() ** 0.5
        assert (value.double() - exact).abs().max() <= 1e-5 * max(1, exact.abs().max()) + floor


def test_weighted_sums_take_any_layout_and_threads(threads: None) -> None:
    tensors = [torch.randn(40, 70, 9), torch.randn(70, 40, 9).transpose(0, 1)]
    weight = torch.tensor([0.5, 2.0], requires_grad=True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = weighted_sum(tensors, weight)
        results.append((out, *torch.autograd.grad(out.square().sum(), weight)))
    torch.testing.assert_close(results[0][0], 0.5 * tensors[0] + 2 * tensors[1])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
