"""The associative scan: the float64 definition, gradients, bounded memory, and no operator of ours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import Case, assert_close, in_float64, inputs, run
from torch import Tensor

from mmtrain.ops import backend_report, causal_conv1d, reference, scan_backend, selective_scan
from mmtrain.ops.reference import CHUNK, linear_recurrence


def compare(case: Case) -> None:
    tensors = inputs(case)
    with scan_backend("parallel"):
        found = run(case, tensors)
    assert_close(case, found, in_float64(case, tensors))


@pytest.mark.parametrize("length", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_output_and_gradients_match_float64_around_the_chunks(length: int, reverse: bool) -> None:
    compare(Case(length=length, reverse=reverse, channels_last=length % 2 == 0))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    per_group=st.integers(1, 4),
    groups=st.integers(1, 3),
    length=st.integers(1, 70),
    state=st.integers(1, 9),
    channels_last=st.booleans(),
    reverse=st.booleans(),
    softplus=st.booleans(),
    full=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_float64(batch: int, per_group: int, groups: int, **rest: int) -> None:
    compare(Case(batch=batch, channels=per_group * groups, groups=groups, **rest))  # type: ignore[arg-type]


def test_float64_gradients_are_those_of_the_definition() -> None:
    """By autograd's own numerical check, over three chunks."""
    case = Case(batch=1, channels=2, length=2 * CHUNK + 1, state=1, full=False)
    tensors = {name: tensor.detach().double() for name, tensor in inputs(case).items()}
    u = tensors.pop("u")[..., :].requires_grad_()
    with scan_backend("parallel"):
        assert torch.autograd.gradcheck(lambda u: selective_scan(u, **tensors, delta_softplus=True), u, fast_mode=True)


def test_decays_that_underflow_forget_and_do_not_divide() -> None:
    """Steps of exp(-200) each: the sum over a chunk is far below the smallest float, the answer is not."""
    generator = torch.Generator().manual_seed(0)
    length = 300
    u = torch.rand(1, 3, length, generator=generator)
    delta = torch.full_like(u, 200.0)
    delta[..., ::50] = 1e-3
    A, ones = -torch.ones(3, 2), torch.ones(1, 2, length)
    with scan_backend("parallel"):
        found = selective_scan(u, delta, A, ones, ones)
    with scan_backend("reference"):
        expected = selective_scan(*(t.double() for t in (u, delta, A, ones, ones)))
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_recurrence_goes_on_from_its_initial_state() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 13, 3, generator=generator), torch.randn(2, 13, 3, generator=generator)
    whole = linear_recurrence(a, b)
    for cut in (1, 6, 12):
        first = linear_recurrence(a[:, :cut], b[:, :cut])
        rest = linear_recurrence(a[:, cut:], b[:, cut:], first[:, -1:])
        torch.testing.assert_close(torch.cat([first, rest], 1), whole)


def saved_bytes(length: int) -> int:
    """What autograd keeps of one scan, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tensors = inputs(Case(batch=1, channels=8, length=length, state=16, full=False))
    with scan_backend("parallel"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = selective_scan(**tensors, delta_softplus=True)
    assert out.requires_grad
    return sum(kept.values())


def test_the_states_of_a_long_sequence_are_not_kept() -> None:
    """All states are 16 times the input; chunks computed again keep a few inputs and one state a chunk."""
    chunks = 8
    inputs_bytes = 4 * chunks * CHUNK * 8
    assert saved_bytes(chunks * CHUNK) < 16 * inputs_bytes
    assert saved_bytes(CHUNK) > 16 * inputs_bytes / chunks  # one chunk is not computed again


def test_it_is_chosen_by_name_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "linear_recurrence", lambda a, b, initial=None: torch.zeros_like(b))
    tensors = {n: t.detach() for n, t in inputs(Case(full=False)).items()}
    assert selective_scan(**tensors).any()
    with scan_backend("parallel"):
        assert not selective_scan(**tensors).any()
    monkeypatch.setenv("MMTRAIN_SCAN", "parallel")
    assert not selective_scan(**tensors).any()
    assert backend_report()["backend"] == "parallel"


def test_the_convolution_in_this_mode_is_that_of_torch() -> None:
    x, weight, bias = torch.randn(2, 3, 11), torch.randn(3, 4), torch.randn(3)
    expected = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=3)[..., :11]
    with scan_backend("parallel"):
        torch.testing.assert_close(causal_conv1d(x, weight, bias), expected)
