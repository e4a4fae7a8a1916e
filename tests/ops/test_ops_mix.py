"""The mixer interior as one C++ operator against its composition in float64, and what it keeps and costs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import Direction, scan_backend, selective_mix
from mmtrain.ops.arguments import NAMES


@dataclass(frozen=True)
class Mix:
    batch: tuple[int, ...] = (2,)
    height: int = 1
    width: int = 70
    channels: int = 20
    state: int = 16
    rank: int = 2
    orders: tuple[str, ...] = NAMES[:2]
    taps: int = 4
    gated: bool = True
    channels_last: bool = True
    seed: int = 0

    @property
    def length(self) -> int:
        return self.height * self.width


def inputs(case: Mix) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """x and the parameters of each direction, float32."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = case.channels * (2 if case.gated else 1)
    last, other = (*case.batch, case.length, width), (*case.batch, width, case.length)
    x = normal(*last) if case.channels_last else normal(*other).mT
    directions = []
    for _ in case.orders:
        d = case.channels
        made = {
            "x_proj": normal(case.rank + 2 * case.state, d) * d**-0.5,
            "dt_proj": normal(d, case.rank) * case.rank**-0.5,
            "dt_bias": normal(d) - 3,
            "A": -torch.exp(0.5 * normal(d, case.state)),
            "D": normal(d),
        }
        if case.taps:
            made |= {"conv": normal(d, case.taps) * case.taps**-0.5, "conv_bias": 0.1 * normal(d)}
        directions.append(made)
    return x, directions


def run(case: Mix, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x, made = inputs(case)
    x = x.to(dtype).requires_grad_()
    leaves, directions = [x], []
    for order, parameters in zip(case.orders, made, strict=True):
        narrow = {name: value.to(dtype).requires_grad_() for name, value in parameters.items()}
        leaves += narrow.values()
        directions.append(Direction(**narrow, order=order))  # type: ignore[arg-type]
    with scan_backend(backend):
        y = selective_mix(x, directions, case.gated, case.height)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, weight)]


def assert_close(case: Mix) -> None:
    """Output to 1e-5 (a convolution, two products and a scan), gradients to 1e-4 of the largest element or of 1."""
    found, expected = run(case, torch.float32, "cpu"), run(case, torch.float64, "reference")
    for i, (value, exact) in enumerate(zip(found, expected, strict=True)):
        error = (value.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
        assert error <= (1e-4 if i else 1e-5), (i, error, case)


@pytest.mark.parametrize(
    "case",
    [
        Mix(),
        Mix(batch=(3, 2), width=130, channels=33, state=5, rank=3, taps=3, channels_last=False),
        Mix(height=9, width=8, channels=40, orders=NAMES, taps=0, gated=False),
        Mix(height=9, width=8, channels=40, orders=NAMES, taps=2),
        Mix(batch=(70,), width=63, channels=64, orders=NAMES[:1]),
        Mix(batch=(1,), width=200, channels=49, rank=3, gated=False, channels_last=False),
        Mix(height=7, width=13, channels=100, state=7, rank=20, orders=NAMES[2:], taps=0),
        Mix(batch=(1,), width=1, channels=1, state=1, rank=1, orders=NAMES[:1], taps=1),
        Mix(width=5, channels=3, state=2, taps=8),
    ],
    ids=str,
)
def test_matches_float64_on_every_isa(case: Mix, isa: str) -> None:
    assert_close(case)


@st.composite
def cases(draw: st.DrawFn) -> Mix:
    return Mix(
        batch=draw(st.sampled_from([(1,), (3,), (5, 2)])),
        height=draw(st.integers(1, 12)),
        width=draw(st.integers(1, 24)),
        channels=draw(st.integers(1, 70)),
        state=draw(st.integers(1, 20)),
        rank=draw(st.integers(1, 18)),
        orders=tuple(draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))),
        taps=draw(st.sampled_from([0, 2, 3, 4, 5])),
        gated=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_matches_float64_for_any_shape(case: Mix) -> None:
    assert_close(case)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_same_bits_for_any_number_of_threads(batch: int, threads: None) -> None:
    case = Mix(batch=(batch,), height=10, width=13, channels=40, orders=NAMES, taps=0)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, torch.float32, "cpu"))
    for values in zip(*results, strict=True):
        assert all(torch.equal(value, values[0]) for value in values)


def test_sequences_along_any_axis_without_a_copy() -> None:
    _, made = inputs(Mix(channels=12))
    directions = [Direction(**parameters, order=order) for order, parameters in zip(NAMES[:2], made, strict=True)]  # type: ignore[arg-type]
    x = torch.randn(2, 7, 5, 24)  # (batch, variates, patches, channels): along the variates
    found = selective_mix(x.transpose(1, 2), directions, gated=True).transpose(1, 2)
    assert found.is_contiguous()
    for b in range(2):
        for p in range(5):
            torch.testing.assert_close(found[b, :, p], selective_mix(x[b, :, p][None], directions, gated=True)[0])


def test_it_keeps_its_input_and_a_few_states() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    case = Mix(batch=(8,), width=256, channels=64)
    x, made = inputs(case)
    x.requires_grad_()
    directions = [Direction(**p, order=order) for order, p in zip(case.orders, made, strict=True)]  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_mix(x, directions, gated=True)
    parameters = 4 * sum(value.numel() for direction in made for value in direction.values())
    states = 4 * 8 * 2 * 3 * 16 * 64
    assert sum(kept.values()) <= 4 * x.numel() + states + parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [Mix(), Mix(channels_last=False, gated=False), Mix(height=7, width=10, orders=NAMES, taps=0)]
)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, case: Mix) -> None:
    """Read and written narrow, nothing else: the only difference is the last rounding."""
    x, made = inputs(case)
    directions = [Direction(**p, order=order) for order, p in zip(case.orders, made, strict=True)]  # type: ignore[arg-type]
    narrow, wide = x.to(dtype).requires_grad_(), x.to(dtype).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = selective_mix(narrow, directions, case.gated, case.height)
    expected = selective_mix(wide, directions, case.gated, case.height)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    dout = torch.randn(found.shape).to(dtype)
    (dx,), (exact,) = torch.autograd.grad(found, narrow, dout), torch.autograd.grad(expected, wide, dout.float())
    assert torch.equal(dx, exact.to(dtype))


def test_fusion_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, made = inputs(Mix())
    x.requires_grad_()
    directions = [Direction(**p, order=order) for order, p in zip(NAMES[:2], made, strict=True)]  # type: ignore[arg-type]

    def operator() -> str:
        node = selective_mix(x, directions, gated=True).grad_fn
        names = set()
        while node is not None:
            names.add(type(node).__name__)
            node = node.next_functions[0][0] if node.next_functions else None
        return " ".join(names)

    assert "selective_mix" in operator()
    monkeypatch.setenv("MMTRAIN_FUSE", "0")
    assert "selective_mix" not in operator()
    monkeypatch.setenv("MMTRAIN_FUSE", "no")
    with pytest.raises(UserError, match="MMTRAIN_FUSE='no': must be 1"):
        operator()


def test_bad_input_names_the_argument() -> None:
    x, made = inputs(Mix())
    good = Direction(**made[0])  # type: ignore[arg-type]
    for wrong, match in (
        (lambda: selective_mix(x[0], [good], True), r"x has shape \(70, 40\), expected \(batch"),
        (lambda: selective_mix(x[..., :39], [good], True), "39 channels; with a gate"),
        (lambda: selective_mix(x, [good], True, 3), "height=3 must .* divide the 70 positions"),
        (lambda: selective_mix(x, [], True), "no order given"),
        (lambda: selective_mix(x, [good._replace(order="row")], True), r"unknown order 'row'.* 'rows'"),
        (lambda: selective_mix(x, [good, good._replace(D=x)], True), r"directions\[1\]\.D has shape"),
        (lambda: selective_mix(x, [good._replace(x_proj=x[0])], True), r"x_proj has shape .* \(R \+ 2N, D\)"),
        (lambda: selective_mix(x, [good._replace(A=good.A.double())], True), r"directions\[0\]\.A is torch.float64"),
        (lambda: selective_mix(x, [good._replace(conv=good.D)], True), r"conv has shape \(20,\), expected \(D, K\)"),
    ):
        with pytest.raises(UserError, match=match):
            wrong()  # type: ignore[no-untyped-call]
