"""Which implementation runs: kernels for CPUs or GPUs, or plain PyTorch. The choice is told once, never silent.

=============  ==================================================================================
``cpu``        C++ kernels (``csrc/``): CPU tensors of float32, bfloat16, float16
``triton``     Triton kernels (``triton/``): CUDA tensors of the same dtypes
``mamba_ssm``  mamba-ssm's and causal-conv1d's CUDA kernels, if installed, for what they can do; ``triton`` for the rest
``reference``  plain PyTorch: any device and float dtype, slow
``parallel``   plain PyTorch as an associative scan: the same, in log2 L steps; what exported models are made of
=============  ==================================================================================

Environment: ``MMTRAIN_SCAN`` is the backend (one of ``BACKENDS``; ``scan_backend`` overrides it);
``MMTRAIN_SCAN_ISA=auto|avx512|avx2|baseline`` narrows the instruction set; ``MMTRAIN_CACHE`` names the folder for a
library built on first use. ``MMTRAIN_FUSE=0`` composes mixers of several operators instead of one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from mmtrain.errors import UserError, nearest
from mmtrain.log import logger
from mmtrain.ops import upstream
from mmtrain.ops.cpu import build, library

BACKENDS = ("auto", "reference", "parallel", "cpu", "triton", "mamba_ssm")
#: Those for CUDA tensors.
GPU_BACKENDS = ("triton", "mamba_ssm")
#: What the C++ kernels read and write; others are converted.
CPU_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = {"reference": "plain PyTorch", "parallel": "plain PyTorch, associative scan"}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("mmtrain_scan_backend", default=None)
_told: set[str] = set()


def tell_once(key: str, level: int, message: str) -> None:
    """Log a message, but only the first one under this key in the process."""
    if key not in _told:
        _told.add(key)
        logger.log(level, message)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"{source}: {name!r} is none of {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    return name


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Use one backend for every scan and convolution in the ``with`` block, one of ``BACKENDS``.

    A function compiled by ``torch.compile`` keeps the backend that was in force when it was traced.

    Raises:
        UserError: unknown name.
    """
    token = _override.set(_checked(name, "scan_backend"))
    try:
        yield
    finally:
        _override.reset(token)


def requested() -> str:
    """The backend asked for: by ``scan_backend``, else by ``MMTRAIN_SCAN``, else "auto"."""
    return _override.get() or _checked(os.environ.get("MMTRAIN_SCAN", "").strip() or "auto", "MMTRAIN_SCAN")


@torch.compiler.assume_constant_result
def fusing() -> bool:
    """Whether mixers run as one operator, where there is one: ``MMTRAIN_FUSE`` (1 or 0), else True."""
    asked = os.environ.get("MMTRAIN_FUSE", "").strip() or "1"
    if asked not in {"0", "1"}:
        raise UserError(f"MMTRAIN_FUSE={asked!r} is neither 1 (mixers as one operator) nor 0 (composed of several)")
    return asked == "1"


# Under torch.compile this runs while tracing and its answer is a constant of the compiled code.
@torch.compiler.assume_constant_result
def choose(device: str, float64: bool) -> str:
    """The backend for tensors on a device type ("cpu", "cuda", "meta") of float64 or of narrower floats.

    Raises:
        UserError: the backend asked for cannot take these tensors, or is not there.
    """
    name = requested()
    if name in _PLAIN:
        tell_once(
            name, logging.INFO, f"selective_scan and causal_conv1d: {name} backend ({_PLAIN[name]}), as asked for"
        )
        return name
    if device == "meta":
        return "cpu"  # shapes and FLOPs only: the kernel's rules, no library needed
    found, obstacle, cure = _kernels(device, float64, name)
    if found and name in ("auto", found):
        return found
    if name != "auto":
        obstacle = obstacle or f"it does not take {device} tensors"
        raise UserError(f"the {name} backend was asked for, but {obstacle}; cure: {cure}, or ask for auto")
    tell_once(
        obstacle,
        logging.WARNING,
        f"selective_scan and causal_conv1d run the SLOW reference (plain PyTorch, often 100 times slower): {obstacle}. "
        f"Cure: {cure}. To accept it silently set MMTRAIN_SCAN=reference.",
    )
    return "reference"


def _kernels(device: str, float64: bool, name: str) -> tuple[str, str, str]:
    """The kernels for tensors on a device, or "" with what is in the way and the cure. ``name``: what is asked for."""
    if float64:
        return "", "the kernels compute in float32, and the tensors are float64", "use float32 tensors"
    if device == "cuda" or (name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return _gpu_kernels(name)
    if device != "cpu":
        return "", f"there is no kernel for {device} tensors", "move the model to the CPU or to a CUDA GPU"
    if name in ("triton", "mamba_ssm"):
        return "", "the tensors are on the CPU", "move the model to a CUDA GPU"
    if library.load().library is None:
        return "", f"the C++ kernels are not available: {library.load().reason}", build.CURE
    if "cpu" not in _told:
        kernels = library.loaded()
        settings = f"{kernels.isa}, {torch.get_num_threads()} threads, library {library.load().how}: {kernels.path}"
        tell_once("cpu", logging.INFO, f"selective_scan and causal_conv1d: cpu backend ({settings})")
    return "cpu", "", ""


def _gpu_kernels(name: str) -> tuple[str, str, str]:
    if name in ("auto", "mamba_ssm"):
        there, reason = upstream.available("scan")
        if there:
            tell_once(
                "mamba_ssm",
                logging.INFO,
                "selective_scan: mamba-ssm's kernel, and ours in Triton for what it cannot do",
            )
            return "mamba_ssm", "", ""
        if name == "mamba_ssm":
            return "", reason, "install it as docs/install.md says"
    if not has_triton():
        return "", "Triton is not installed", TRITON_CURE
    tell_once("triton", logging.INFO, "selective_scan and causal_conv1d: triton backend")
    return "triton", "", ""


TRITON_CURE = "pip install triton (it comes with the CUDA build of torch)"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def tell_triton_instead(name: str, obstacle: str) -> None:
    """Say once that the Triton kernel runs instead of mamba-ssm's or causal-conv1d's, or raise UserError without it."""
    if not has_triton():
        raise UserError(f"{name}: {obstacle}, and Triton is not installed; cure: {TRITON_CURE}")
    tell_once(f"{name}: {obstacle}", logging.INFO, f"{name}: our Triton kernel, since {obstacle}")


def backend_report() -> dict[str, str | int]:
    """What runs for float32 tensors, for ``mmtrain doctor``. Builds the CPU's library if it was never built.

    Keys: ``backend`` (what runs on the CPU: cpu, reference or parallel), ``requested``, ``library`` (path or ""),
    ``built`` (installed, built on first use, missing), ``reason`` (why it is not the installed one, or ""), ``cure``
    (or ""), ``isa``, ``threads``; ``gpu`` (what runs on a CUDA GPU, or why nothing would), ``triton`` and ``mamba_ssm``
    ("yes", or what is missing and the cure).
    """
    result = library.load()
    available = result.library is not None
    there, why = upstream.available("scan")
    return {
        "backend": requested() if requested() in _PLAIN else "cpu" if available else "reference",
        "requested": requested(),
        "library": str(result.library.path) if result.library else "",
        "built": result.how,
        "reason": result.reason,
        "cure": "" if available else build.CURE,
        "isa": result.library.isa if result.library else "",
        "threads": torch.get_num_threads(),
        "gpu": _gpu_report(),
        "triton": "yes" if has_triton() else TRITON_CURE,
        "mamba_ssm": "yes" if there else f"{why} (docs/install.md has the commands)",
    }


def _gpu_report() -> str:
    if not torch.cuda.is_available():
        return "no CUDA GPU here"
    name = requested() if requested() in ("triton", "mamba_ssm") else "auto"
    found, obstacle, cure = _gpu_kernels(name)
    return found or f"{obstacle}; cure: {cure}"
