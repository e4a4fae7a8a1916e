"""mamba-ssm's and causal-conv1d's CUDA kernels behind the signatures of ours. Neither is ever required.

Upstream's ``selective_scan_fn`` (mamba_ssm.ops.selective_scan_interface) takes u, delta, z (B, D, L), A (D, N),
B and C (B, N, L) or (B, G, N, L), and ``causal_conv1d_fn`` x (B, D, L) with weights (D, W); they know no reversed
direction (flipped here), no initial state, and no more than 256 states. :func:`obstacle` and :func:`conv_obstacle`
tell what they cannot do, so that a dispatcher can go elsewhere.
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
CONV_WIDTHS = (2, 3, 4)  # what causal-conv1d's kernels are instantiated for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODULES = {
    "scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "conv": ("causal_conv1d", "causal_conv1d_fn"),
}


@functools.cache
def _load(which: str) -> tuple[Callable[..., Any] | None, str]:
    """(the function, "") or (None, why not). Importing them may fail in any way: they load compiled libraries."""
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
    """Whether upstream's "scan" or "conv" can be called, and if not, why."""
    function, reason = _load(which)
    return function is not None, reason


def _function(which: str) -> Callable[..., Any]:
    function, reason = _load(which)
    if function is None:
        raise RuntimeError(f"upstream's {which} is not available: {reason}")
    return function


def obstacle(inputs: ScanInputs) -> str | None:
    """Why upstream's scan cannot take these, or None."""
    ok, reason = available("scan")
    if not ok:
        return reason
    if inputs.u.device.type != "cuda":
        return f"mamba-ssm takes CUDA tensors, not {inputs.u.device.type} ones"
    return _scan_limits(inputs)


def _scan_limits(inputs: ScanInputs) -> str | None:
    """The part of :func:`obstacle` that depends on the arguments alone."""
    u, delta, A, B, *_ = inputs
    if inputs.initial_state is not None:
        return "mamba-ssm's scan starts from a zero state"
    if A.shape[-1] > MOST_STATES:
        return f"mamba-ssm takes up to {MOST_STATES} states, not {A.shape[-1]}"
    if A.is_complex() or A.dtype != torch.float32:
        return f"only a float32 A is passed to mamba-ssm, not {A.dtype}"
    if u.dtype not in DTYPES:
        return f"mamba-ssm takes float32, bfloat16 and float16, not {u.dtype}"
    if B.dtype != u.dtype or delta.dtype != u.dtype:
        return "mamba-ssm wants u, delta, B and C in one dtype"
    if u.shape[1] % B.shape[1]:
        return "the groups of B do not divide the channels"
    return None


def conv_obstacle(x: Tensor, weight: Tensor) -> str | None:
    """Why upstream's convolution cannot take these, or None. x (Bt, D, L), weight (D, W)."""
    ok, reason = available("conv")
    if not ok:
        return reason
    if x.device.type != "cuda":
        return f"causal-conv1d takes CUDA tensors, not {x.device.type} ones"
    return _conv_limits(x, weight)


def _conv_limits(x: Tensor, weight: Tensor) -> str | None:
    """The part of :func:`conv_obstacle` that depends on the arguments alone."""
    if weight.shape[1] not in CONV_WIDTHS:
        return f"causal-conv1d takes 2 to 4 taps, not {weight.shape[1]}"
    if x.dtype not in DTYPES:
        return f"causal-conv1d takes float32, bfloat16 and float16, not {x.dtype}"
    if x.stride(1) == 1 and x.stride(2) != 1 and x.shape[1] % 8:
        return "causal-conv1d takes channels-last tensors only with a multiple of 8 channels"
    return None


def _flipped(tensor: Tensor, reverse: bool) -> Tensor:
    return tensor.flip(-1) if reverse else tensor


def selective_scan_upstream(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """``selective_scan_fn``: out (Bt, D, L) and the last state (Bt, D, N) in float32.

    Raises:
        RuntimeError: mamba-ssm is not there.
        ValueError: there is an initial state.
    """
    if inputs.initial_state is not None:
        raise ValueError("mamba-ssm's scan starts from a zero state")
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
    """``causal_conv1d_fn``; arguments and result as of ``causal_conv1d_triton``.

    Raises:
        RuntimeError: causal-conv1d is not there.
    """
    out = _function("conv")(_flipped(x, reverse), weight, bias=bias, activation="silu" if silu else None)
    return _flipped(out, reverse)
