"""The Triton convolution: what the interpreter shows on a CPU (`interpreted_conv.py`)."""

from __future__ import annotations

import pytest
from triton_cases import run_interpreted

pytest.importorskip("triton", reason="Triton is not installed here (it is for Linux only)")


@pytest.mark.slow
def test_conv_kernels_under_the_interpreter() -> None:
    run_interpreted("interpreted_conv.py")
