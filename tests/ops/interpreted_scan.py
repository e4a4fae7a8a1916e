"""The scan kernels under Triton's interpreter against float64; run by ``test_triton_scan.py``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import Case, assert_close, error, expected, found, inputs

from mmtrain.ops import scan_backend, selective_scan
from mmtrain.ops.arguments import ScanInputs
from mmtrain.ops.triton import scan_launch, tuning
from mmtrain.ops.triton.api import directional_scan_triton, selective_scan_triton
from mmtrain.ops.triton.operators import directional_scan_fwd
from mmtrain.ops.triton.tuning import Launch

# Blocks smaller than the cases, so that their edges are met; the tables' own blocks are met in the last tests.
SMALL = {
    "scan_forward": Launch(4, 1, 2),
    "scan_forward_few": Launch(4, 1, 2),
    "scan_backward": Launch(4, 1, 2),
}

CASES = {
    "cross": (Case(), {"chunk": 4}),
    "cross, per direction, positions adjacent": (Case(shared=False, channels_last=False, batch=2), {"chunk": 8}),
    "gate, several chunks": (Case(gate=True, batch=2), {"chunk": 4, "batches": 2}),
    "gate, one direction": (Case((1,), gate=True, height=1, width=7), {"chunk": 4}),
    "one row": (Case(height=1, width=9), {"chunk": 4}),
    "one column": (Case(height=6, width=1), {"chunk": 4}),
    "one position": (Case(height=1, width=1, batch=3), {}),
    "columns only, tall": (Case((3, 2), height=5, width=2), {"chunk": 4}),
    "states in and out": (Case((0, 3), initial=True), {"chunk": 4}),
    "split": (Case((0, 1), height=1, width=13, initial=True), {"chunk": 4, "split_length": 4}),
    "split grid": (Case((2, 3), height=3, width=5), {"chunk": 2, "split_length": 6, "batches": 2}),
    "split, batch": (Case((1,), batch=3, height=1, width=6), {"chunk": 2, "split_length": 2, "batches": 2}),
    "groups": (Case((0, 2), channels=6, groups=3, state=4), {"chunk": 4}),
    "groups wider than a block": (Case((1,), channels=12, groups=2, height=1), {"chunk": 4}),
    "bare": (Case((0, 3), full=False, softplus=False), {"chunk": 4}),
    "one channel, one state": (Case((0, 1), channels=1, state=1), {"chunk": 4}),
    "16 states": (Case((0, 3), channels=4, state=16), {"chunk": 8}),
    "64 states": (Case((1,), channels=4, state=64, height=2), {"chunk": 4}),
    "half": (Case(dtype=torch.float16, gate=True), {"chunk": 4}),
    "half, per direction": (Case((2, 1), shared=False, dtype=torch.float16), {"chunk": 4}),
    "bfloat16, which kernels only load, cast and store": (Case((0, 3), gate=True, dtype=torch.bfloat16), {"chunk": 4}),
    "large steps": (Case((0,), shift=30.0), {"chunk": 4}),
    "huge steps": (Case((0,), shift=3000.0), {"chunk": 4}),
    "tiny steps": (Case((0,), shift=-12.0), {"chunk": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str) -> None:
    case, numbers = CASES[name]
    tensors = inputs(case)
    with tuning.override(SMALL, **numbers):
        values = found(case, tensors)
    assert_close(case, values, expected(case, tensors))
    for key, tensor in tensors.items():
        assert values[key].dtype == tensor.dtype
        assert values[key].shape == tensor.shape
    assert values["out"].dtype == case.dtype
    assert values["last_state"].dtype == torch.float32
    if case.length > 1 and case.channels > 1:
        assert (values["out"].stride(1) == 1) == case.channels_last


@pytest.mark.parametrize("unroll", [1, 4])
def test_any_unrolling_and_folding(unroll: int) -> None:
    case = Case((3,), channels=7, height=3, width=7)
    tensors = inputs(case)
    launches = {name: Launch(8, 1, unroll, 2 if name == "scan_backward" else 1) for name in SMALL}
    with tuning.override(launches, chunk=8):
        assert_close(case, found(case, tensors), expected(case, tensors))


def test_the_tables_configurations() -> None:
    case = Case((0, 2), channels=40, state=16, height=1, width=5)
    tensors = inputs(case)
    assert_close(case, found(case, tensors), expected(case, tensors))


def test_the_same_bits_again_and_with_the_batch_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((0, 3), batch=3, height=2, gate=True, initial=True)
    tensors = inputs(case)
    with tuning.override(SMALL, chunk=4, batches=1):
        once, twice = found(case, tensors), found(case, tensors)
        monkeypatch.setattr(scan_launch, "BUFFER_BYTES", 1)
        sliced = found(case, tensors)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
        if name in ("A", "D", "delta_bias"):  # sums over the batch: in another order
            assert error(sliced[name], value.double()) < 1e-6
        else:
            assert torch.equal(value, sliced[name]), name


def test_backward_without_saved_states() -> None:
    case = Case((0, 1), gate=True)
    tensors = inputs(case)
    arguments = [tensors.get(name) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias", "z", "initial_state")]
    with tuning.override(SMALL, chunk=4):
        results = []
        for save in (True, False):
            out = directional_scan_fwd(*arguments, True, case.height, case.width, [0, 1], save, False)[0]
            results.append(torch.autograd.grad(out.sum(), list(tensors.values())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_selective_scan_door(reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 5, 9), "delta": (2, 5, 9), "A": (5, 3), "B": (2, 1, 3, 9), "C": (2, 1, 3, 9), "D": (5,)}
    t = {name: torch.randn(shape, generator=generator) for name, shape in (shapes | {"z": (2, 5, 9)}).items()}
    t["A"] = -t["A"].exp()
    t = {name: value.requires_grad_() for name, value in t.items()}
    with tuning.override(SMALL, chunk=4):
        out, last = selective_scan_triton(ScanInputs(**t, delta_softplus=True, reverse=reverse))
        # the state at the end of the first part is the start of the second
        cut = 4
        parts = [slice(None, cut), slice(cut, None)]
        pieces = []
        state = None
        for part in reversed(parts) if reverse else parts:
            cuts = {n: v[..., part] if n in ("u", "delta", "B", "C", "z") else v for n, v in t.items()}
            piece, state = selective_scan_triton(
                ScanInputs(**cuts, delta_softplus=True, reverse=reverse, initial_state=state)
            )
            pieces.append(piece)
        grads = torch.autograd.grad(out.sum(), list(t.values()))
    doubles = {n: v.detach().double().requires_grad_() for n, v in t.items()}
    with scan_backend("reference"):
        exact = selective_scan(**doubles, delta_softplus=True, reverse=reverse)
    assert error(out.detach(), exact.detach()) < 2e-6
    for grad, reference in zip(grads, torch.autograd.grad(exact.sum(), list(doubles.values())), strict=True):
        assert error(grad, reference) < 2e-5
    assert error(torch.cat(pieces[::-1] if reverse else pieces, -1).detach(), exact.detach()) < 2e-6
    assert state is not None
    assert error(state.detach(), last.detach().double()) < 2e-6


def test_directional_door_and_flops() -> None:
    case = Case()
    t = inputs(case)
    arguments = (t["u"], t["delta"], t["A"], t["B"][:, :, 0], t["C"][:, :, 0], t["D"], t["delta_bias"])
    grid = (case.height, case.width, case.orders)
    with tuning.override(SMALL, chunk=4), FlopCounterMode(display=False) as counter:
        out = directional_scan_triton(*arguments, True, *grid)
        out.sum().backward()
    assert error(out.detach(), expected(case, t)["out"]) < 2e-6
    assert counter.get_total_flops() == 3 * 4 * case.length * case.channels * (9 * case.state + 1)


def test_opcheck() -> None:
    case = Case((0, 3), gate=True, initial=True)
    t = inputs(case)
    arguments = tuple(t[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias", "z", "initial_state"))
    with tuning.override(SMALL, chunk=4):
        for channels_last in (True, False):
            u = t["u"].detach() if channels_last else t["u"].detach().contiguous()
            result = torch.library.opcheck(
                torch.ops.mmtrain.directional_scan_fwd.default,
                (u.requires_grad_(), *arguments[1:], True, case.height, case.width, [0, 3], True, True),
            )
            assert set(result.values()) == {"SUCCESS"}


def test_compiles_into_one_graph_with_fake_tensors() -> None:
    case = dataclasses.replace(Case((0, 1)), height=2, width=2, channels=2)
    t = inputs(case)

    def block(u: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        rest = (t["A"], t["B"][:, :, 0], t["C"][:, :, 0], None, None)
        return directional_scan_triton(u.tanh(), delta, *rest, True, 2, 2, (0, 1)).square()

    with tuning.override(SMALL, chunk=4):
        results = []
        for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            out = run(t["u"], t["delta"])
            results.append((out, *torch.autograd.grad(out.sum(), (t["u"], t["delta"]))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_empty_batch() -> None:
    t = {name: v.detach()[:0] if name in ("u", "delta", "B", "C") else v for name, v in inputs(Case()).items()}
    t["u"].requires_grad_()
    out = directional_scan_triton(
        *(t["u"], t["delta"], t["A"], t["B"][:, :, 0], t["C"][:, :, 0], t["D"], t["delta_bias"]),
        *(True, 3, 4, (0, 1, 2, 3)),
    )
    assert out.shape == (0, 5, 12)
    assert torch.autograd.grad(out.sum(), t["A"])[0].eq(0).all()
