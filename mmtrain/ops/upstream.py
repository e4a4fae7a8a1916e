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


def obstacle(
    u: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None = None, delta: Tensor | None = None
) -> str | None:
    """Why upstream's scan cannot take these, or None. u (Bt, D, L), A (D, N), B (Bt, G, N, L)."""
    ok, reason = available("scan")
    if not ok:
        return reason
    if u.device.type != "cuda":
        return f"mamba-ssm takes CUDA tensors, not {u.device.type} ones"
    return _scan_limits(u, A, B, initial_state, delta)


def _scan_limits(u: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None, delta: Tensor | None) -> str | None:
    """The part of :func:`obstacle` that depends on the arguments alone."""
    if initial_state is not None:
        return "mamba-ssm's scan starts from a zero state"
    if A.shape[-1] > MOST_STATES:
        return f"mamba-ssm takes up to {MOST_STATES} states, not {A.shape[-1]}"
    if A.is_complex() or A.dtype != torch.float32:
        return f"only a float32 A is passed to mamba-ssm, not {A.dtype}"
    if u.dtype not in DTYPES:
        return f"mamba-ssm takes float32, bfloat16 and float16, not {u.dtype}"
    if B.dtype != u.dtype or (delta is not None and delta.dtype != u.dtype):
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


def _flipped(tensor: Tensor | None, reverse: bool) -> Tensor | None:
    return tensor.flip(-1) if reverse and tensor is not None else tensor


def selective_scan_upstream(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``selective_scan_fn``; arguments and results as of ``selective_scan_triton``, but no initial state.

    Raises:
        RuntimeError: mamba-ssm is not there.
        ValueError: there is an initial state.
    """
    if initial_state is not None:
        raise ValueError("mamba-ssm's scan starts from a zero state")
    u, delta, B, C, z = (_flipped(t, reverse) for t in (u, delta, B, C, z))  # type: ignore[assignment]
    out, last = _function("scan")(
        u,
        delta,
        A.float(),
        B,
        C,
        D=None if D is None else D.float(),
        z=z,
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=True,
    )
    out = _flipped(out, reverse)
    assert out is not None
    return out, last.float()


def causal_conv1d_upstream(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """``causal_conv1d_fn``; arguments and result as of ``causal_conv1d_triton``.

    Raises:
        RuntimeError: causal-conv1d is not there.
    """
    flipped = _flipped(x, reverse)
    out = _function("conv")(flipped, weight, bias=bias, activation="silu" if silu else None)
    result = _flipped(out, reverse)
    assert result is not None
    return result
