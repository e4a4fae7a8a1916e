"""torch.compile and the checks of torch.library: blocks are one graph, and every operator of ours keeps the rules."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import mmtrain.ops
from mmtrain.models.averaging import MixerStack
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer, SequenceMixer
from proof.measures import gradients, scaled_error

BLOCKS = {
    "mixer of one direction": (lambda: SequenceMixer(16), (2, 20, 16)),
    "mixer of two directions": (lambda: SequenceMixer(16, bidirectional=True), (2, 20, 16)),
    "image token mixer": (lambda: ImageTokenMixer(16), (2, 6, 9, 16)),
    "image channel mixer": (lambda: ImageChannelMixer(16, window=4), (2, 6, 9, 16)),
    "stack": (
        lambda: MixerStack(
            [SequenceMixer(8), SequenceMixer(8, bidirectional=True)],
            [nn.LayerNorm(8), nn.LayerNorm(8)],
            [nn.Identity(), nn.Identity()],
            averaging=True,
        ),
        (2, 20, 8),
    ),
}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_compiles_into_one_graph(name: str) -> None:
    """Fused kernels sum in other orders and use another exponential: 1e-5 of the scale forward, 1e-4 backward.

    A weight just before a norm, as a stack's first average, has a gradient of 0 but for rounding: so the scale is at
    least a thousandth of the largest gradient's.
    """
    build, shape = BLOCKS[name]
    block: nn.Module = build()
    x, weight = torch.randn(shape), torch.randn(shape)
    eager = gradients(block, x, weight)
    in_one_graph = cast(nn.Module, torch.compile(block, fullgraph=True))
    compiled = gradients(in_one_graph, x, weight)
    # torch.compile's module names its parameters after the one that it wraps
    compiled = {key.removeprefix("_orig_mod."): value for key, value in compiled.items()}
    assert compiled.keys() == eager.keys()
    floor = 1e-3 * max(value.abs().max().item() for value in eager.values())
    for key, value in eager.items():
        assert compiled[key].stride() == value.stride(), key
        assert scaled_error(compiled[key], value, floor) < (1e-5 if key == "out" else 1e-4), key


def sequences(channels: int, length: int, count: int) -> list[Tensor]:
    """(2, channels, length), alternately in the layout of the models (channels last) and contiguous."""
    plain = [torch.randn(2, channels, length) for _ in range(count)]
    return [t.mT.contiguous().mT if i % 2 else t for i, t in enumerate(plain)]


def scan_samples(backward: bool) -> Iterator[tuple[object, ...]]:
    for length, groups, extras, save in ((70, 1, True, True), (70, 2, False, True), (9, 1, True, not backward)):
        tensors = sequences(6, length, 2)
        tensors += [-torch.rand(6, 3) - 0.1, torch.randn(2, groups, 3, length), torch.randn(2, groups, 3, length)]
        if not backward:
            tensors = [t.requires_grad_() for t in tensors]
        optional = (torch.randn(6), torch.randn(6), torch.randn(2, 6, 3)) if extras else (None, None, None)
        flags = (True, groups == 2)
        if not backward:
            yield (*tensors, *optional, *flags, save, extras)
            continue
        out, last, states = torch.ops.mmtrain.selective_scan_fwd(*tensors, *optional, *flags, True, extras)
        yield (torch.randn_like(out), torch.randn_like(last), *tensors, *optional, states, *flags)


def conv_samples(backward: bool) -> Iterator[tuple[object, ...]]:
    for taps, bias, silu, reverse in ((4, True, True, False), (3, False, False, True)):
        x, dout = sequences(6, 20, 2)
        weight, offset = torch.randn(6, taps), torch.randn(6) if bias else None
        if backward:
            yield dout, x, weight, offset, silu, reverse
        else:
            yield x.requires_grad_(), weight.requires_grad_(), offset, silu, reverse


def mix_samples(backward: bool) -> Iterator[tuple[object, ...]]:
    """Both directions of a sequence with a convolution and a gate; four over a grid without."""
    for orders, height, taps in (([0, 1], 1, 4), ([0, 1, 2, 3], 5, 0)):
        k, d, n, r = len(orders), 6, 3, 2
        x = torch.randn(2, 2, 70, 2 * d if taps else d)
        conv = (torch.randn(k, d, taps), torch.randn(k, d)) if taps else (None, None)
        tensors = [x, *conv, torch.randn(k, r + 2 * n, d), torch.randn(k, d, r)]
        tensors += [torch.randn(k, d), -torch.rand(k, d, n) - 0.1, torch.randn(k, d)]
        settings = (orders, height, 0.5, taps > 0)
        if backward:
            out, states = torch.ops.mmtrain.selective_mix_fwd(*tensors, *settings, True)
            yield (torch.randn_like(out), *tensors, states, *settings)
        else:
            leaves = [None if t is None else t.requires_grad_() for t in tensors]
            yield (*leaves, *settings, True)


def linear_samples(backward: bool) -> Iterator[tuple[object, ...]]:
    for bias in (True, False):
        x, weight, dy = torch.randn(30, 8), torch.randn(5, 8), torch.randn(30, 5)
        if backward:
            yield dy, x, weight, bias, not bias
        else:
            yield x.requires_grad_(), weight.requires_grad_(), torch.randn(5) if bias else None


def sum_samples(backward: bool) -> Iterator[tuple[object, ...]]:
    for count in (1, 3):
        tensors, weight = [torch.randn(2, 7, 5) for _ in range(count)], torch.randn(count)
        if backward:
            yield torch.randn(2, 7, 5), tensors, weight
        else:
            yield [t.requires_grad_() for t in tensors], weight.requires_grad_()


def dropout_samples() -> Iterator[tuple[object, ...]]:
    yield torch.randn(3, 7, 5).requires_grad_(), torch.tensor([1, -2, 3], dtype=torch.int32), 0, 2.0


SAMPLES = {
    "keyed_dropout": dropout_samples,
    "selective_mix_fwd": lambda: mix_samples(backward=False),
    "selective_mix_bwd": lambda: mix_samples(backward=True),
    "linear_fwd": lambda: linear_samples(backward=False),
    "linear_bwd": lambda: linear_samples(backward=True),
    "weighted_sum_fwd": lambda: sum_samples(backward=False),
    "weighted_sum_bwd": lambda: sum_samples(backward=True),
    "selective_scan_fwd": lambda: scan_samples(backward=False),
    "selective_scan_bwd": lambda: scan_samples(backward=True),
    "causal_conv1d_fwd": lambda: conv_samples(backward=False),
    "causal_conv1d_bwd": lambda: conv_samples(backward=True),
}


def registered() -> set[str]:
    """Every operator of the namespace ``mmtrain`` that importing mmtrain.ops defines, with its overload, but for those
    in Triton, whose tests have an interpreter (tests/ops/interpreted_*.py)."""
    for module in pkgutil.walk_packages(mmtrain.ops.__path__, "mmtrain.ops."):
        if module.name.endswith("_kernels") or module.name.startswith("mmtrain.ops.triton"):
            continue  # a plain shared library, not a module of Python's; what another process tests
        importlib.import_module(module.name)
    names = {name.removeprefix("mmtrain::") for name in torch._C._dispatch_get_all_op_names() if "mmtrain::" in name}
    return {name for name in names if "triton" not in name and not name.startswith("directional_scan")}


def test_every_operator_has_samples() -> None:
    assert registered() == SAMPLES.keys(), "give every operator its samples above, so that opcheck sees it"


@pytest.mark.parametrize("name", SAMPLES)
def test_every_operator_passes_opcheck(name: str) -> None:
    for arguments in SAMPLES[name]():
        found = torch.library.opcheck(getattr(torch.ops.mmtrain, name).default, arguments)
        assert set(found.values()) == {"SUCCESS"}
