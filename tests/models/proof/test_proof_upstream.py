"""The published Mamba code and ours agree: the scan, the convolution, the whole block, and their gradients.

Tolerances: both sides compute in float32 with sums of up to some hundred terms in different orders, so elements agree
to about 1e-6 of the tensor's largest element; 2e-5 (outputs) and 1e-4 (gradients, sums over the whole batch) leave
room, while a wrong term or a transposed axis is an error of order 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from upstream import Upstream

from mmtrain.models.mixers import SequenceMixer
from mmtrain.ops import causal_conv1d, selective_scan
from proof.measures import gradients, scaled_error

OUT, GRADIENT = 2e-5, 1e-4

# upstream's name of each parameter → ours
NAMES = {
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "scan.conv.0.weight",
    "conv1d.bias": "scan.conv.0.bias",
    "x_proj.weight": "scan.ssm.0.x_proj.weight",
    "dt_proj.weight": "scan.ssm.0.dt_proj.weight",
    "dt_proj.bias": "scan.ssm.0.dt_proj.bias",
    "A_log": "scan.ssm.0.A_log",
    "D": "scan.ssm.0.D",
    "out_proj.weight": "out_proj.weight",
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = scaled_error(found[name], value)
        assert error < (OUT if name == "out" else GRADIENT), f"{name}: {error:.2g} of its scale"


def copied(block: nn.Module, mixer: nn.Module) -> None:
    """Copy the weights of upstream's block; every parameter of both sides must have its partner."""
    theirs, ours = dict(block.named_parameters()), dict(mixer.named_parameters())
    assert theirs.keys() == NAMES.keys()
    assert ours.keys() == set(NAMES.values())
    with torch.no_grad():
        for name, partner in NAMES.items():
            ours[partner].copy_(theirs[name])


@pytest.mark.parametrize(
    ("dim", "length", "state", "conv", "expand"),
    [(16, 33, 16, 4, 2), (40, 70, 8, 3, 2), (24, 1, 16, 4, 1), (8, 130, 5, 2, 3)],
)
def test_a_one_direction_mixer_is_upstreams_mamba_block(
    upstream: Upstream, dim: int, length: int, state: int, conv: int, expand: int
) -> None:
    block = upstream.block(dim, state, conv, expand)
    mixer = SequenceMixer(dim, expand=expand, state=state, conv=conv)
    copied(block, mixer)
    x, weight = torch.randn(2, length, dim), torch.randn(2, length, dim)
    expected = gradients(block, x, weight)
    assert_same(gradients(mixer, x, weight), {NAMES.get(name, name): value for name, value in expected.items()})


def test_mixer_and_block_start_alike(upstream: Upstream) -> None:
    """Fresh blocks: parameters that are not random are equal, the others have the same spread.

    32,768 or more draws a weight: the standard error of a deviation is under 0.4 %, 2 % allowed.
    """
    block, mixer = upstream.block(128, 16, 4, 2), SequenceMixer(128)
    theirs, ours = dict(block.named_parameters()), dict(mixer.named_parameters())
    for name in ("A_log", "D"):
        assert torch.equal(ours[NAMES[name]], theirs[name])
    for name in ("in_proj.weight", "out_proj.weight"):
        assert ours[NAMES[name]].std().item() == pytest.approx(theirs[name].std().item(), rel=0.02)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 90),
    state=st.integers(1, 17),
    groups=st.sampled_from([0, 1, 2, 3]),
    each=st.integers(1, 9),
    extras=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    softplus=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_scan_is_upstreams(
    upstream: Upstream,
    batch: int,
    length: int,
    state: int,
    groups: int,
    each: int,
    extras: set[str],
    softplus: bool,
    seed: int,
) -> None:
    """``groups`` 0: B and C without a group axis."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels = each * max(groups, 1)
    grouped = (batch, groups, state, length) if groups else (batch, state, length)
    tensors = {name: normal(batch, channels, length) for name in ("u", "delta")}
    # without softplus a step must be positive, as the models make it, else the state grows without bound
    tensors["delta"] = tensors["delta"] if softplus else tensors["delta"].abs()
    tensors |= {"A": -torch.exp(normal(channels, state)), "B": normal(*grouped), "C": normal(*grouped)}
    shapes = {"D": (channels,), "z": (batch, channels, length), "delta_bias": (channels,)}
    tensors |= {name: normal(*shapes[name]) for name in sorted(extras)}
    if not softplus and "delta_bias" in tensors:
        tensors["delta_bias"] = tensors["delta_bias"].abs()
    weight = normal(batch, channels, length)
    results = []
    for scan in (selective_scan, upstream.scan):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = cast(Callable[..., Tensor], scan)(**leaves, delta_softplus=softplus)
        found = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
        results.append({"out": out.detach(), **dict(zip(leaves, found, strict=True))})
    assert_same(*results)


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    length=st.integers(1, 90),
    taps=st.integers(2, 4),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_causal_convolution_is_upstreams(
    upstream: Upstream, batch: int, channels: int, length: int, taps: int, bias: bool, activation: str | None
) -> None:
    x, weight = torch.randn(batch, channels, length), torch.randn(channels, taps)
    offset = torch.randn(channels) if bias else None
    expected = upstream.conv(x, weight, offset, activation=activation)
    assert_same({"out": causal_conv1d(x, weight, offset, activation=activation)}, {"out": expected})
