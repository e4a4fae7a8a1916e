"""The Triton kernels on a real GPU: against float64, bit for bit the same again, compiled, and beside mamba-ssm.

Written without a GPU at hand; what the interpreter and the compiler can show without one is in ``tests/ops``.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from triton_cases import Case, assert_close, error, expected, found, inputs

from mmtrain.ops import upstream
from mmtrain.ops.arguments import ScanInputs
from mmtrain.ops.reference import causal_conv1d_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch sees no GPU here"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The hardware's exp2 is good to two units in the last place, numpy's in the interpreter to half of one.
HARDWARE = 5.0

CASES = {
    "cross": Case(batch=2, channels=96, height=14, width=14, state=16),
    "cross, odd": Case(batch=3, channels=33, height=9, width=13, state=5, gate=True, initial=True),
    "per direction, positions adjacent": Case(
        (0, 3), batch=2, channels=48, height=8, width=9, state=16, shared=False, channels_last=False
    ),
    "sequence, gate": Case((1,), batch=4, channels=64, height=1, width=130, state=16, gate=True),
    "short": Case((0, 1), batch=300, channels=64, height=1, width=7, state=16),
    "long enough to be split": Case((0,), batch=1, channels=32, height=1, width=3000, state=16),
    "one state": Case((2,), channels=128, height=6, width=20, state=1),
    "64 states": Case((0,), channels=40, height=5, width=20, state=64),
    "256 states": Case((3,), channels=10, height=5, width=8, state=256),
    "groups": Case((0, 1), channels=96, groups=3, height=1, width=70, state=16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scan_matches_float64(name: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(CASES[name], dtype=dtype)
    tensors = inputs(case, "cuda")
    assert_close(case, found(case, tensors), expected(case, tensors), HARDWARE)


@pytest.mark.parametrize("name", ["cross", "short", "long enough to be split"])
def test_scan_gives_the_same_bits_again(name: str) -> None:
    case = dataclasses.replace(CASES[name], dtype=torch.bfloat16)
    tensors = inputs(case, "cuda")
    for (key, value), again in zip(found(case, tensors).items(), found(case, tensors).values(), strict=True):
        assert torch.equal(value, again), key


def conv_inputs(width: int, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 150, 72, generator=generator).transpose(1, 2)
    tensors = [x if channels_last else x.contiguous(), torch.randn(72, width, generator=generator)]
    return [t.to("cuda", dtype).requires_grad_() for t in [*tensors, torch.randn(72, generator=generator)]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_conv_matches_float64_and_itself(width: int, dtype: torch.dtype, channels_last: bool, reverse: bool) -> None:
    from mmtrain.ops.triton.api import causal_conv1d_triton

    tensors = conv_inputs(width, dtype, channels_last)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    start = torch.randn(3, 72, 150, device="cuda", dtype=dtype)
    results = []
    for _ in range(2):
        out = causal_conv1d_triton(*tensors, True, reverse)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, start)])
    exact = causal_conv1d_reference(*doubles, True, reverse)
    references = [exact.detach(), *torch.autograd.grad(exact, doubles, start.double())]
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for i, (value, again, reference) in enumerate(zip(*results, references, strict=True)):
        assert torch.equal(value, again)
        assert error(value, reference) <= HARDWARE * (2e-5 if i else 2e-6) + rounding


class Scanned(nn.Module):
    """A projection, a cross-scan of 2 directions, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(32, 32), nn.Linear(32, 32)
        self.steps, self.rows = nn.Linear(32, 2 * 32), nn.Linear(32, 4 * 16)
        self.A_log = nn.Parameter(torch.rand(2, 32, 16))
        self.D = nn.Parameter(torch.ones(2, 32))

    def forward(self, x: Tensor) -> Tensor:
        """x (Bt, L, 32)."""
        from mmtrain.ops.triton.api import directional_scan_triton

        u = F.silu(self.before(x))
        delta = self.steps(u).unflatten(-1, (2, 32)).permute(0, 2, 3, 1)
        B, C = self.rows(u).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 4, 1)
        out = directional_scan_triton(
            u.transpose(1, 2)[:, None], delta, -self.A_log.exp(), B, C, self.D, None, True, 8, 9, (0, 3)
        )
        return self.after(out.transpose(1, 2))


def test_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    model = Scanned().cuda()
    x = torch.randn(4, 72, 32, device="cuda")
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        loss = run(x).square().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not upstream.available()[0], reason=f"mamba-ssm: {upstream.available()[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [True, False])
def test_agrees_with_mamba(dtype: torch.dtype, reverse: bool) -> None:
    from mmtrain.ops.triton.api import selective_scan_triton

    case = Case((0,), batch=2, channels=64, height=1, width=300, state=16, groups=2, gate=True, dtype=dtype)
    t = inputs(case, "cuda")
    arguments = [t[n][:, 0] for n in ("u", "delta")] + [t["A"][0]] + [t[n][:, 0] for n in "BC"]
    arguments += [t["D"][0], t["z"], t["delta_bias"][0]]
    leaves = list(t.values())
    results = []
    for scan in (selective_scan_triton, upstream.selective_scan_upstream):
        out, last = scan(ScanInputs(*arguments, True, reverse))
        results.append([out, last, *torch.autograd.grad(out.float().square().mean(), leaves)])
    allowed = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for ours, theirs in zip(*results, strict=True):
        assert error(ours.detach(), theirs.detach().double()) <= allowed
