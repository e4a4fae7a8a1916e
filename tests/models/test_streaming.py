"""The recurrent mode of a causal mixer against its full forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.models.mixers import SequenceMixer
from mmtrain.models.streaming import SequenceState, prefill, start, step
from mmtrain.models.tsm2 import TimeMixer, VariateMixer


def steps(mixer: SequenceMixer, x: Tensor, state: SequenceState) -> tuple[Tensor, SequenceState]:
    """All positions of x (B, L, dim), one after the other."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = step(mixer, x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the scale; without a convolution its window has no elements."""
    scale = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40),
    split=st.floats(0, 1),
    dim=st.integers(1, 20),
    conv=st.integers(0, 6),
    state=st.integers(1, 17),
    expand=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_steps_and_prefill_equal_the_full_forward(
    length: int, split: float, dim: int, conv: int, state: int, expand: int, seed: int
) -> None:
    torch.manual_seed(seed)
    mixer = SequenceMixer(dim, expand=expand, state=state, conv=conv)
    x = torch.randn(3, length, dim)
    full = mixer(x)
    stepped, last = steps(mixer, x, start(mixer, 3))
    assert_same(stepped, full)
    prefix = max(1, round(split * length))
    y, middle = prefill(mixer, x[:, :prefix])
    assert_same(y, full[:, :prefix])
    if prefix < length:
        y, middle = steps(mixer, x[:, prefix:], middle)
        assert_same(y, full[:, prefix:])
    assert_same(middle.ssm, last.ssm)
    assert_same(middle.conv, last.conv)


@torch.no_grad()
def test_a_long_prefix_goes_on_as_the_full_forward() -> None:
    """Several chunks of the sum for the last state, with steps so large that their decays underflow."""
    torch.manual_seed(0)
    mixer = SequenceMixer(8)
    mixer.scan.ssm[0].dt_proj.bias += 3
    x = torch.randn(2, 1003, 8)
    y, state = prefill(mixer, x[:, :1000])
    tail, _ = steps(mixer, x[:, 1000:], state)
    assert_same(torch.cat([y, tail], 1), mixer(x))


@torch.no_grad()
def test_states_are_float32_or_as_asked_and_are_not_changed() -> None:
    mixer = SequenceMixer(4, conv=3, state=5)
    begin = start(mixer, 2)
    assert begin.conv.shape == (2, 8, 2)
    assert begin.ssm.shape == (2, 8, 5)
    assert {begin.conv.dtype, begin.ssm.dtype} == {torch.float32}
    _, after = step(mixer, torch.randn(2, 4), begin)
    assert not begin.conv.any()
    assert not begin.ssm.any()
    assert after.ssm.any()
    assert after.ssm.dtype == torch.float32
    assert start(mixer, 1, torch.float64).ssm.dtype == torch.float64


@torch.no_grad()
def test_a_mixer_in_bfloat16_keeps_a_float32_state() -> None:
    torch.manual_seed(0)
    mixer = SequenceMixer(16).bfloat16()
    x = torch.randn(2, 30, 16, dtype=torch.bfloat16)
    y, state = steps(mixer, x, start(mixer, 2))
    assert y.dtype == torch.bfloat16
    assert {state.conv.dtype, state.ssm.dtype} == {torch.float32}
    full = mixer(x)
    assert (y - full).abs().max() <= 0.03 * full.abs().max()


def test_gradients_flow_through_steps() -> None:
    torch.manual_seed(0)
    mixer = SequenceMixer(4, state=3)
    x = torch.randn(2, 7, 4)
    parameters = list(mixer.parameters())
    stepped, _ = steps(mixer, x, start(mixer, 2))
    found = torch.autograd.grad(stepped.square().sum(), parameters)
    expected = torch.autograd.grad(mixer(x).square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_time_mixer_of_tsm2_streams_each_variate() -> None:
    torch.manual_seed(0)
    mixer = TimeMixer(8)
    x = torch.randn(2, 3, 9, 8)
    stepped, _ = steps(mixer, x.flatten(0, 1), start(mixer, 6))
    assert_same(stepped.view(x.shape), mixer(x))


def test_what_cannot_stream_says_why() -> None:
    both = VariateMixer(4, bidirectional=True)
    for call in (
        lambda: start(both, 1),
        lambda: prefill(both, torch.zeros(1, 2, 4)),
        lambda: step(both, torch.zeros(1, 4), start(SequenceMixer(4), 1)),
    ):
        with pytest.raises(ValueError, match=r"VariateMixer is bidirectional.*bidirectional=False"):
            call()
    causal = SequenceMixer(4)
    with pytest.raises(ValueError, match=r"\(1, 5\).*one position"):
        step(causal, torch.zeros(1, 5), start(causal, 1))
    with pytest.raises(ValueError, match=r"\(3, 4\).*one position"):
        step(causal, torch.zeros(3, 4), start(causal, 1))
    with pytest.raises(ValueError, match=r"expected \(B, L, 4\)"):
        prefill(causal, torch.zeros(1, 0, 4))
