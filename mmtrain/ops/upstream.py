"""Adapters for the CUDA kernels of mamba-ssm and causal-conv1d ("upstream"). Both packages are optional.

``selective_scan_fn`` (mamba_ssm.ops.selective_scan_interface) takes u, delta, z (B, D, L), A (D, N), B and C (B, N, L)
or (B, G, N, L); ``causal_conv1d_fn`` takes x (B, D, L) and weights (D, W). They do not support a reversed direction
(inputs are flipped here), an initial state, or more than 256 states. :func:`obstacle` and :func:`conv_obstacle` report
unsupported inputs, so that the caller can use another backend.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.arguments import ScanInputs

MOST_STATES = 256  # MAX_DSTATE in mamba's csrc/selective_scan/selective_scan.h
CONV_WIDTHS = (2, 3, 4)  # widths that causal-conv1d's kernels support
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODULES = {
    "scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "conv": ("causal_conv1d", "causal_conv1d_fn"),
}


@functools.cache
def _load(which: str) -> tuple[Callable[..., Any] | None, str]:
    """Return (function, "") or (None, reason). Importing a compiled library can raise any exception; all are caught."""
    module, name = _MODULES[which]
    try:
        imported = importlib.import_module(module)
        function = getattr(imported, name)
    except Exception as error:
        return None, f"{module}: {type(error).__name__}: {error}"
    if which == "scan" and getattr(imported, "selective_scan_cuda", function) is None:
        return None, f"{module} has no compiled kernel (selective_scan_cuda): build it with MAMBA_KEEP_CUDA_BUILD=TRUE"
    if which == "conv" and function is None:
        return None, f"{module} has no compiled kernel"
    return function, ""


def available(which: str = "scan") -> tuple[bool, str]:
    """Return whether the upstream kernel "scan" or "conv" is available, and the reason if not."""
    function, reason = _load(which)
    return function is not None, reason


def _function(which: str) -> Callable[..., Any]:
    function, reason = _load(which)
    if function is None:
        raise RuntimeError(f"the upstream {which} kernel is not available: {reason}")
    return function


def obstacle(inputs: ScanInputs) -> str | None:
    """Return why the upstream scan cannot run with these inputs, or None if it can."""
    ok, reason = available("scan")
    if not ok:
        return reason
    if inputs.u.device.type != "cuda":
        return f"mamba-ssm supports only CUDA tensors, not {inputs.u.device.type} tensors"
    return _scan_limits(inputs)


def _scan_limits(inputs: ScanInputs) -> str | None:
    """Return why the upstream scan does not support these inputs on a CUDA device, or None."""
    u, delta, A, B, *_ = inputs
    if inputs.initial_state is not None:
        return "mamba-ssm does not support an initial state"
    if A.shape[-1] > MOST_STATES:
        return f"mamba-ssm supports at most {MOST_STATES} states, not {A.shape[-1]}"
    if A.is_complex() or A.dtype != torch.float32:
        return f"mamba-ssm needs A in float32, not {A.dtype}"
    if u.dtype not in DTYPES:
        return f"mamba-ssm supports float32, bfloat16 and float16, not {u.dtype}"
    if B.dtype != u.dtype or delta.dtype != u.dtype:
        return "mamba-ssm needs u, delta, B and C in one dtype"
    if u.shape[1] % B.shape[1]:
        return "the groups of B do not divide the channels"
    return None


def conv_obstacle(x: Tensor, weight: Tensor) -> str | None:
    """Return why the upstream convolution cannot run with x (Bt, D, L) and weight (D, W), or None if it can."""
    ok, reason = available("conv")
    if not ok:
        return reason
    if x.device.type != "cuda":
        return f"causal-conv1d supports only CUDA tensors, not {x.device.type} tensors"
    return _conv_limits(x, weight)


def _conv_limits(x: Tensor, weight: Tensor) -> str | None:
    """Return why the upstream convolution does not support these inputs on a CUDA device, or None."""
    if weight.shape[1] not in CONV_WIDTHS:
        return f"causal-conv1d supports 2 to 4 taps, not {weight.shape[1]}"
    if x.dtype not in DTYPES:
        return f"causal-conv1d supports float32, bfloat16 and float16, not {x.dtype}"
    if x.stride(1) == 1 and x.stride(2) != 1 and x.shape[1] % 8:
        return "causal-conv1d supports channels-last tensors only if the number of channels is a multiple of 8"
    return None


def _flipped(tensor: Tensor, reverse: bool) -> Tensor:
    return tensor.flip(-1) if reverse else tensor


def selective_scan_upstream(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run mamba-ssm's scan and return out (Bt, D, L) and the last state (Bt, D, N) in float32.

    Raises:
        RuntimeError: if mamba-ssm is not available.
        ValueError: if there is an initial state.
    """
    if inputs.initial_state is not None:
        raise ValueError("mamba-ssm does not support an initial state")
    reverse, D, bias = inputs.reverse, inputs.D, inputs.delta_bias
    u, delta, B, C = (_flipped(t, reverse) for t in (inputs.u, inputs.delta, inputs.B, inputs.C))
    out, last = _function("scan")(
        u,
        delta,
        inputs.A.float(),
        B,
        C,
        D=None if D is None else D.float(),
        z=None if inputs.z is None else _flipped(inputs.z, reverse),
        delta_bias=None if bias is None else bias.float(),
        delta_softplus=inputs.delta_softplus,
        return_last_state=True,
    )
    return _flipped(out, reverse), last.float()


def causal_conv1d_upstream(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Run causal-conv1d's convolution. Arguments and result are those of ``causal_conv1d_triton``.

    Raises:
        RuntimeError: if causal-conv1d is not available.
    """
    out = _function("conv")(_flipped(x, reverse), weight, bias=bias, activation="silu" if silu else None)
    return _flipped(out, reverse)
