"""The Triton backend: what the interpreter shows of it on a CPU (`interpreted_api.py`), and refusals."""

from __future__ import annotations

import pytest
import torch
from triton_cases import run_interpreted

from mmtrain.errors import UserError
from mmtrain.ops import scan_backend, selective_scan

pytest.importorskip("triton", reason="Triton is not installed here (it is for Linux only)")


@pytest.mark.slow
def test_every_call_under_the_interpreter() -> None:
    run_interpreted("interpreted_api.py")


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_gpu_backends_refuse_tensors_of_the_cpu(backend: str) -> None:
    u, states = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    with (
        scan_backend(backend),
        pytest.raises(UserError, match=f"the {backend} backend was requested, but the tensors are on the CPU"),
    ):
        selective_scan(u, u, -torch.rand(2, 3), states, states)
