"""``linear``, y = x Wᵀ + b. For float32 on the CPU it uses oneDNN if that is faster than torch's BLAS library.

Torch multiplies float32 matrices with MKL. On processors that are not from Intel, MKL uses AVX2, at half the speed of
oneDNN with AVX-512 (measured by ``benchmarks/linear_cpu.py``, see docs/performance.md). The choice depends only on the
processor and the sizes. ``MMTRAIN_LINEAR=auto|torch|onednn`` overrides it.
"""

from __future__ import annotations

import functools
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.errors import UserError, nearest
from mmtrain.log import logger
from mmtrain.ops import backend
from mmtrain.ops.arguments import check_tensors
from mmtrain.ops.cpu import library
from mmtrain.ops.cpu.library import MatmulArgs
from mmtrain.ops.registration import register

CHOICES = ("auto", "torch", "onednn")
#: With fewer multiplications the overhead of the call exceeds the gain (about 10 µs at 100 GFLOP/s).
_SMALL = 500_000


@functools.cache
def _processor() -> str:
    """Return the vendor and the widest vector instructions, such as "AuthenticAMD avx512", or "" if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    return f"{vendor} {torch.backends.cpu.get_cpu_capability().lower()}".strip()


@functools.cache
def _uses_onednn(choice: str) -> bool:
    if choice not in CHOICES:
        raise UserError(f"MMTRAIN_LINEAR={choice!r}: must be one of {', '.join(CHOICES)}{nearest(choice, CHOICES)}")
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if choice == "onednn" and not available:
        raise UserError("MMTRAIN_LINEAR=onednn: this build of torch has no oneDNN; use auto or torch")
    processor = _processor()
    better = "avx512" in processor and "GenuineIntel" not in processor
    chosen = available and (choice == "onednn" or (choice == "auto" and better))
    if chosen:
        logger.info("float32 matrix products on the CPU: oneDNN (%s)", processor or choice)
    return chosen


# Under torch.compile this runs during tracing, and the result is a constant of the compiled code.
@torch.compiler.assume_constant_result
def _by_onednn() -> bool:
    return _uses_onednn(os.environ.get("MMTRAIN_LINEAR", "").strip() or "auto") and backend.requested() in {
        "auto",
        "cpu",
    }


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, like ``torch.nn.functional.linear``, for any dtype and device.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).
    """
    check_tensors("linear", {"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    # Compare sizes last: in an exported program they are symbols, and a comparison would fix their values.
    fits = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _by_onednn()
        and not torch.compiler.is_exporting()
        and x.numel() * weight.shape[0] >= _SMALL
    )
    if not fits:
        return F.linear(x, weight, bias)
    return linear_fwd(x, weight, bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (M, K) times the transpose of b (N, K), computed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@torch.library.custom_op("mmtrain::linear_fwd", mutates_args=(), device_types="cpu")
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute :func:`linear` in float32. The result is a new tensor, because FSDP2 warns about views."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("mmtrain::linear_bwd", mutates_args=(), device_types="cpu")
def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight) for dy (..., N) and x (..., K). Gradients that are not wanted have no elements."""
    nothing = x.new_empty(0)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = _product(rows, weight.T).view(x.shape) if want_x else nothing
    if not want_weight:
        return dx, nothing
    return dx, _transposed_product(rows.contiguous(), x.reshape(-1, x.shape[-1]).contiguous())


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the transpose of a (M, N) times b (M, K), (N, K).

    An own kernel is used, because oneDNN copies a transposed left factor.
    """
    kernels = library.load().library
    if kernels is None or kernels.isa != "avx512" or b.shape[1] % 16:
        # oneDNN copies one factor: choose the smaller one
        return _product(b.T, a.T).T.contiguous() if b.shape[1] < a.shape[1] else _product(a.T, b.T)
    out = b.new_empty(a.shape[1], b.shape[1])
    args = MatmulArgs(m=len(a), n=a.shape[1], k=b.shape[1], a=a.data_ptr(), b=b.data_ptr(), c=out.data_ptr())
    kernels.call("matmul_tn", args)
    return out


def _empty_gradients(dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    nothing = x.new_empty(0)
    return x.new_empty(x.shape) if want_x else nothing, weight.new_empty(weight.shape) if want_weight else nothing


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.biased = inputs[2] is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    want_x, want_weight, want_bias = ctx.needs_input_grad
    dy = dy.contiguous()
    dx, dweight = linear_bwd(dy, x, weight, want_x, want_weight)
    return (
        dx if want_x else None,
        dweight if want_weight else None,
        dy.flatten(0, -2).sum(0) if ctx.biased and want_bias else None,
    )


register(
    linear_fwd,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    lambda x, weight, *rest, **_: 2 * prod(x) * weight[0],
    _setup_context,
    _backward,
)
register(
    linear_bwd,
    _empty_gradients,
    lambda dy, x, weight, want_x, want_weight, **_: 2 * prod(x) * weight[0] * (want_x + want_weight),
)
