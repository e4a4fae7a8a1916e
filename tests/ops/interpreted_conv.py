"""The convolution kernels under Triton's interpreter against float64; run by ``test_triton_conv.py``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import error

from mmtrain.ops.reference import causal_conv1d_reference
from mmtrain.ops.triton import tuning
from mmtrain.ops.triton.api import causal_conv1d_triton
from mmtrain.ops.triton.tuning import Launch

SMALL = {"conv_forward": Launch(4, 1, 4), "conv_backward": Launch(4, 1, 2)}


@dataclass(frozen=True)
class Case:
    width: int = 4
    batch: int = 2
    channels: int = 6
    length: int = 11
    channels_last: bool = True
    silu: bool = True
    reverse: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.float32


def inputs(case: Case) -> list[Tensor]:
    """x, weight and the bias if there is one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.length, case.channels, generator=generator).transpose(1, 2)
    tensors = [x if case.channels_last else x.contiguous(), torch.randn(case.channels, case.width, generator=generator)]
    if case.bias:
        tensors.append(torch.randn(case.channels, generator=generator))
    return [t.to(case.dtype).requires_grad_() for t in tensors]


def results(case: Case, tensors: list[Tensor], exact: bool) -> list[Tensor]:
    """The output and the gradients."""
    x, weight, bias = (*tensors, None)[:3]
    convolve = causal_conv1d_reference if exact else causal_conv1d_triton
    out = convolve(x, weight, bias, case.silu, case.reverse)
    start = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, start)]


def check(case: Case) -> None:
    tensors = inputs(case)
    found = results(case, tensors, False)
    expected = results(case, [t.detach().double().requires_grad_() for t in tensors], True)
    rounding = 0.0 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps
    for i, (value, reference) in enumerate(zip(found, expected, strict=True)):
        assert value.dtype == case.dtype
        assert error(value, reference) <= (2e-5 if i else 2e-6) + 2 * rounding, (i, case)
    if case.length > 1:
        assert (found[0].stride(1) == 1) == case.channels_last


CASES = [
    (Case(), {}),
    (Case(reverse=True), {"segment": 4, "batches": 2}),
    (Case(width=1, silu=False, bias=False), {"segment": 3}),
    (Case(width=2, channels_last=False), {"segment": 4}),
    (Case(width=3, bias=False, reverse=True, channels_last=False), {"segment": 5, "batches": 3}),
    (Case(width=5, silu=False, batch=3), {"segment": 2, "batches": 4}),
    (Case(width=8, length=5), {"segment": 2}),
    (Case(width=8, length=3, reverse=True, silu=False), {}),
    (Case(width=4, length=1, channels=1), {}),
    (Case(dtype=torch.float16), {"segment": 4}),
    (Case(dtype=torch.float16, reverse=True, channels_last=False), {}),
]


@pytest.mark.parametrize(("case", "numbers"), CASES, ids=[str(c) for c, _ in CASES])
def test_matches_float64(case: Case, numbers: dict[str, int]) -> None:
    with tuning.override(SMALL, **numbers):
        check(case)


@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_with_the_tables_configurations(width: int) -> None:
    check(Case(width=width, length=4, channels=3, batch=1))


def test_the_same_bits_again() -> None:
    case = Case()
    tensors = inputs(case)
    with tuning.override(SMALL, segment=4):
        for a, b in zip(results(case, tensors, False), results(case, tensors, False), strict=True):
            assert torch.equal(a, b)


def test_opcheck_and_flops() -> None:
    x, weight, bias = inputs(Case())
    with tuning.override(SMALL):
        for arguments in ((x, weight, bias, True, False), (x.detach().contiguous(), weight, None, False, True)):
            result = torch.library.opcheck(torch.ops.mmtrain.causal_conv1d_triton_fwd.default, arguments)
            assert set(result.values()) == {"SUCCESS"}
        with FlopCounterMode(display=False) as counter:
            causal_conv1d_triton(x, weight, bias, True, False).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 4


def test_empty_batch() -> None:
    x, weight, bias = inputs(Case())
    out = causal_conv1d_triton(x[:0], weight, bias, True, False)
    assert out.shape == (0, 6, 11)
    assert torch.autograd.grad(out.sum(), weight)[0].eq(0).all()
