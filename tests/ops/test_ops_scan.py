"""The C++ scan against float64, in every layout and on every instruction set; its numerics, memory and determinism."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import Case, assert_close, in_float64, inputs, run
from torch import Tensor

from mmtrain.ops import scan_backend, selective_scan

BOUNDARIES = [
    Case(),
    Case(channels=16, length=64, state=16, channels_last=True),
    Case(channels=33, length=65, state=16, reverse=True),
    Case(batch=1, channels=49, length=192, state=16, channels_last=True, reverse=True),
    Case(batch=3, channels=6, groups=3, state=20, length=130, softplus=False),
    Case(batch=2, channels=64, groups=2, state=1, length=1, channels_last=True),
    Case(batch=130, channels=17, length=7, state=16, channels_last=True),
    Case(batch=1, channels=1, length=1, state=70, full=False),
    Case(channels=33, length=130, state=5, states=True, channels_last=True),
    Case(batch=1, channels=6, groups=2, length=40, states=True, reverse=True),
    Case(batch=1, channels=9, length=4500, state=5, states=True),  # by segments
    Case(batch=1, channels=9, length=4500, state=5, states=True, softplus=False),
]


@pytest.mark.parametrize("case", BOUNDARIES, ids=str)
def test_matches_float64_on_every_isa(case: Case, isa: str) -> None:
    tensors = inputs(case)
    with scan_backend("cpu"):
        found = run(case, tensors)
    assert_close(case, found, in_float64(case, tensors))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return Case(
        batch=draw(st.integers(1, 4)),
        channels=groups * draw(st.integers(1, 70 // groups)),
        length=draw(st.one_of(st.integers(1, 300), st.sampled_from([1, 63, 64, 65, 128, 129]))),
        state=draw(st.integers(1, 20)),
        groups=groups,
        channels_last=draw(st.booleans()),
        reverse=draw(st.booleans()),
        softplus=draw(st.booleans()),
        full=draw(st.booleans()),
        states=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_matches_float64_for_any_shape(case: Case) -> None:
    tensors = inputs(case)
    with scan_backend("cpu"):
        found = run(case, tensors)
    assert_close(case, found, in_float64(case, tensors))
    for name in ("u", "delta", "B", "C"):
        assert found[name].shape == tensors[name].shape
    if case.channels > 1 and case.length > 1:
        assert found["out"].stride() == tensors["u"].stride()
        assert found["u"].stride() == tensors["u"].stride()
        assert found["delta"].stride() == tensors["delta"].stride()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 2000),
    channels=st.integers(1, 130),
    state=st.integers(1, 64),
    step=st.sampled_from([1e-4, 0.1, 1.0, 30.0]),
    reverse=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_errors_stay_small_at_length(
    length: int, channels: int, state: int, step: float, reverse: bool, seed: int
) -> None:
    """To 2e-6 of the largest output, and every gradient to 2e-5 of its largest element, for tiny and for large Δ."""
    case = Case(batch=1, channels=channels, length=length, state=state, reverse=reverse, softplus=False, seed=seed)
    tensors = inputs(case)
    tensors["delta"] = (tensors["delta"].detach() * step).requires_grad_()
    with scan_backend("cpu"):
        found = run(case, tensors)
    for name, exact in in_float64(case, tensors).items():
        error = (found[name].double() - exact).abs().max().item()
        floor = 3e-7 * (length * channels) ** 0.5 if name != "out" else 0.0  # sums of so many terms may cancel
        assert error <= (2e-6 if name == "out" else 2e-5) * exact.abs().max().item() + floor, (name, error, case)


def test_reference_is_the_definition() -> None:
    case = Case(batch=2, channels=4, groups=2, length=5, state=3)
    t = {name: tensor.double() for name, tensor in inputs(case).items()}
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    for b in range(2):
        for d in range(4):
            h = [0.0] * 3
            for i in range(5):
                dt = math.log1p(math.exp(t["delta"][b, d, i].item() + t["delta_bias"][d].item()))
                u, z = t["u"][b, d, i].item(), t["z"][b, d, i].item()
                y = t["D"][d].item() * u
                for n in range(3):
                    B, C = (t[name][b, d // 2, n, i].item() for name in "BC")
                    h[n] = math.exp(dt * t["A"][d, n].item()) * h[n] + dt * B * u
                    y += C * h[n]
                expected[b, d, i] = y * z / (1 + math.exp(-z))
    with scan_backend("reference"):
        found = selective_scan(**t, delta_softplus=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_reference_gradients_by_finite_differences() -> None:
    case = Case(batch=1, channels=2, length=4, state=2)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs(case).values()]
    with scan_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *args: selective_scan(*args, delta_softplus=True, reverse=True),  # type: ignore[misc]
            doubles,
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reverse_is_flip_scan_flip(backend: str) -> None:
    case = Case(length=70, channels_last=True)
    tensors = inputs(case)
    flipped = {name: t.flip(-1) if name in {"u", "delta", "B", "C", "z"} else t for name, t in tensors.items()}
    with scan_backend(backend):
        expected = selective_scan(**flipped, delta_softplus=True).flip(-1)
        torch.testing.assert_close(selective_scan(**tensors, delta_softplus=True, reverse=True), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference", "parallel"])
@pytest.mark.parametrize("cut", [1, 64, 100])
def test_a_scan_goes_on_from_its_last_state(backend: str, cut: int) -> None:
    case = Case(length=150, channels_last=True)
    tensors = {name: t.detach() for name, t in inputs(case).items()}
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        halves = (tensor, tensor) if tensor.dim() < 3 else (tensor[..., :cut], tensor[..., cut:])
        for part, half in zip(parts, halves, strict=True):
            part[name] = half
    with scan_backend(backend):
        whole, end = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
        first, state = selective_scan(**parts[0], delta_softplus=True, return_last_state=True)
        second, last = selective_scan(**parts[1], delta_softplus=True, initial_state=state, return_last_state=True)
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    torch.testing.assert_close(last, end)


def test_odd_strides_are_taken_correctly() -> None:
    case = Case(channels=6, length=80)
    tensors = inputs(case)
    expected = run(case, tensors)
    for name in ("u", "delta", "B", "C"):
        shape = tensors[name].shape
        wide = torch.empty(*shape[:-1], 3 * shape[-1])
        wide[..., ::3] = tensors[name].detach()
        tensors[name] = wide[..., ::3].requires_grad_()
    found = run(case, tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_expanded_output_gradient() -> None:
    case = Case(length=70)
    tensors = inputs(case)
    ones = torch.ones(()).expand(case.batch, case.channels, case.length)
    assert_close(case, run(case, tensors, ones), in_float64(case, tensors, ones))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_low_precision_inputs_are_computed_in_float32(
    dtype: torch.dtype, backend: str, full: bool, channels_last: bool
) -> None:
    case = Case(channels=37, length=70, channels_last=channels_last, full=full)
    tensors = inputs(case)
    low = {n: t.detach().to(dtype if n != "A" else t.dtype).requires_grad_() for n, t in tensors.items()}
    rounded = {n: t.detach().float().requires_grad_() for n, t in low.items()}
    with scan_backend(backend):
        found, expected = run(case, low), run(case, rounded)
    assert found["out"].dtype == dtype
    assert found["A"].dtype == torch.float32
    assert found["out"].stride() == low["u"].stride()
    for name, value in expected.items():
        if name == "out":  # exactly: the only difference is the last rounding
            torch.testing.assert_close(found[name], value.to(dtype), rtol=0, atol=0)
        else:
            scale = value.abs().max().item()
            torch.testing.assert_close(found[name].float() / scale, value / scale, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, channels=40, length=150, state=16, channels_last=True),
        Case(batch=70, channels=20, length=130, state=16),
        Case(batch=1, channels=300, length=400, state=16, channels_last=True),
        Case(batch=1, channels=16, length=4096, state=3, reverse=True),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(case: Case, threads: None) -> None:
    tensors = inputs(case)
    del tensors["z"]  # torch's own silu rounds by how it cuts the tensor
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, tensors))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name


def test_bfloat16_is_rounded_to_nearest_even(isa: str) -> None:
    # a channel and a position each, y = D u: all kinds of floats, NaN among them (an infinity times B = 0 is one)
    bits = torch.arange(0, 2**32, 65_521, dtype=torch.int64).to(torch.int32)
    u = bits.view(torch.float32).bfloat16()
    u = u[~u.isinf()].view(1, -1, 1)
    none = torch.zeros(1, 1, 1)
    for scale in (1.0, 1.0039):
        D = torch.full((u.shape[1],), scale)
        y = selective_scan(u, torch.zeros_like(u), torch.zeros(u.shape[1], 1), none, none, D)
        expected = (u.float() * scale).bfloat16()
        assert torch.equal(y.isnan(), expected.isnan())
        # subnormal numbers are flushed while a kernel runs
        normal = ~expected.isnan() & (expected.float().abs() >= 1.2e-38) & (u.float().abs() >= 1.2e-38)
        assert torch.equal(y[normal], expected[normal])
        assert normal.float().mean() > 0.98


def test_exp_is_accurate(isa: str) -> None:
    # Two positions with h_1 = 1, then y_2 = exp(x); the argument itself is rounded to float32 in units of log2(e).
    x = torch.cat([-torch.logspace(-8, 1.93, 4000), torch.linspace(0, 80, 500)])
    u = torch.tensor([1.0, 0.0]).expand(1, len(x), 2)
    ones = torch.ones(1, 1, 2)
    y = selective_scan(u, torch.ones_like(u), x[:, None].contiguous(), ones, ones)[0, :, 1].double()
    exact = x.double().exp()
    relative = (y - exact).abs() / exact
    assert (relative <= 2.4e-7 + 1.2e-7 * x.double().abs()).all()
    assert (y[x == 0] == 1.0).all()


def test_softplus_is_accurate_for_any_argument(isa: str) -> None:
    # With A = 0 and one position y = softplus(delta); 1 ulp of float32 is 1.2e-7.
    x = torch.cat([torch.linspace(-80, 80, 2001), torch.tensor([1e-20, -1e-20, 0.0, 1e4, 1e30])])
    delta = x.reshape(1, -1, 1)
    ones = torch.ones(1, 1, 1)
    y = selective_scan(torch.ones_like(delta), delta, torch.zeros(len(x), 1), ones, ones, delta_softplus=True)
    exact = torch.where(x > 50, x.double(), torch.log1p(x.double().exp()))
    torch.testing.assert_close(y.reshape(-1).double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("step", [1e-30, 1e-6, 30.0, 1e6, 1e25])
def test_extreme_steps(step: float, isa: str) -> None:
    case = Case(softplus=False, full=False, length=70)
    tensors = inputs(case)
    tensors["delta"] = torch.full_like(tensors["delta"], step).requires_grad_()
    found, expected = run(case, tensors), in_float64(case, tensors)
    for name in ("out", "u", "B", "C", "delta"):
        scale = expected[name].abs().max().item()
        assert torch.isfinite(found[name]).all(), name
        assert (found[name].double() - expected[name]).abs().max().item() <= 1e-4 * scale + 1e-37, name


@pytest.mark.parametrize("value", [-0.0, 1e-45, 1e-39, 1e18])
def test_negative_zeros_subnormal_and_huge_inputs_give_no_nan(value: float, isa: str) -> None:
    case = Case(softplus=True, length=70)
    for name in ("u", "delta", "A", "B", "C"):
        tensors = inputs(case)
        tensors[name] = (torch.ones_like(tensors[name]) * (-value if name == "A" else value)).requires_grad_()
        for key, tensor in run(case, tensors).items():
            assert not tensor.isnan().any(), (name, key)


def test_nan_goes_through_and_stays_where_it_belongs(isa: str) -> None:
    case = Case(batch=2, channels=20, length=100, full=False)
    for name in ("u", "delta", "B", "C"):
        tensors = {n: t.detach().clone() for n, t in inputs(case).items()}
        tensors[name][1, 1 if name in {"u", "delta"} else 0, 50] = math.nan
        y = selective_scan(**tensors, delta_softplus=True)
        touched = torch.zeros(2, 20, 100, dtype=torch.bool)
        if name in {"u", "delta"}:
            touched[1, 1, 50:] = True
        elif name == "B":
            touched[1, :, 50:] = True
        else:
            touched[1, :, 50] = True
        assert torch.equal(y.isnan(), touched), name


def test_no_nan_or_inf_is_swallowed_in_the_backward() -> None:
    case = Case(length=70)
    tensors = inputs(case)
    grad = torch.ones(case.batch, case.channels, case.length)
    grad[0, 0, 30] = math.nan
    found = run(case, tensors, grad)
    for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"):
        assert found[name].isnan().any(), name
    assert not found["u"][1].isnan().any()


def test_empty_batch() -> None:
    case = dataclasses.replace(Case(), batch=0)
    found = run(case, inputs(case))
    assert found["out"].shape == (0, case.channels, case.length)
    assert found["A"].abs().sum() == 0


def test_backward_without_saved_states_recomputes_them() -> None:
    case = Case(length=150, full=False)
    t = {name: tensor.detach() for name, tensor in inputs(case).items()}
    args = (t["u"], t["delta"], t["A"], t["B"][:, None], t["C"][:, None], None, None, None)
    grad, no_grad = torch.ones_like(t["u"]), torch.empty(0)
    states = [torch.ops.mmtrain.selective_scan_fwd(*args, True, False, save, False)[2] for save in (True, False)]
    assert states[0].numel() > 0 == states[1].numel()
    kept, recomputed = (torch.ops.mmtrain.selective_scan_bwd(grad, no_grad, *args, s, True, False) for s in states)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


MEMORY_SCRIPT = """
import resource, sys, torch
from mmtrain.ops import selective_scan
L, D, N = map(int, sys.argv[1:])
u, delta = (torch.rand(1, L, D).transpose(1, 2).requires_grad_() for _ in range(2))
B, C = (torch.rand(1, L, N).transpose(1, 2).requires_grad_() for _ in range(2))
A = (-torch.rand(D, N)).requires_grad_()
selective_scan(u[..., :64], delta[..., :64], A, B[..., :64], C[..., :64]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grads = torch.autograd.grad(selective_scan(u, delta, A, B, C).sum(), (u, delta, A, B, C))
assert all(g.isfinite().all() for g in grads)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    ("length", "channels", "state", "most"),
    # L·D·N floats would be 4.3 GB and 0.8 GB; each of the large inputs is 34 to 67 MB
    [(2**17, 64, 128, 1000), (65536, 192, 16, 400)],
)
@pytest.mark.slow
def test_memory_stays_near_that_of_the_inputs(length: int, channels: int, state: int, most: int) -> None:
    """What a forward and backward pass adds: outputs, gradients and saved states."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, *map(str, (length, channels, state))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < most, f"peak memory grew by {result.stdout} MB"
