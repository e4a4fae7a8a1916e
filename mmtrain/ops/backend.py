"""Selection of the backend of scans and convolutions. The selected backend is logged once.

=============  =======================================================================================
``cpu``        C++ kernels (``csrc/``) for CPU tensors of float32, bfloat16 and float16
``triton``     Triton kernels (``triton/``) for CUDA tensors of the same dtypes
``mamba_ssm``  CUDA kernels of mamba-ssm and causal-conv1d, if installed; ``triton`` for unsupported inputs
``reference``  plain PyTorch, position by position, for any device and float dtype; slow
``parallel``   plain PyTorch, an associative scan in log2 L rounds; used in exported models
=============  =======================================================================================

Environment variables: ``MMTRAIN_SCAN`` selects the backend (one of ``BACKENDS``); ``scan_backend`` overrides it.
``MMTRAIN_SCAN_ISA=auto|avx512|avx2|baseline`` limits the instruction set. ``MMTRAIN_CACHE`` is the folder of the
library that is compiled at first use. ``MMTRAIN_FUSE=0`` runs mixers as several operators instead of one.
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
#: The backends for CUDA tensors.
GPU_BACKENDS = ("triton", "mamba_ssm")
#: Dtypes that the C++ kernels read and write. Other dtypes are converted.
CPU_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = {"reference": "plain PyTorch", "parallel": "plain PyTorch, associative scan"}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("mmtrain_scan_backend", default=None)
_logged: set[str] = set()


def log_once(key: str, level: int, message: str) -> None:
    """Log ``message`` unless a message with this key was already logged in this process."""
    if key not in _logged:
        _logged.add(key)
        logger.log(level, message)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"{source}={name!r}: must be one of {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    return name


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Use the backend ``name`` (one of ``BACKENDS``) for all scans and convolutions in the ``with`` block.

    A function compiled by ``torch.compile`` always uses the backend that was active when it was traced.

    Raises:
        UserError: for an unknown name.
    """
    token = _override.set(_checked(name, "scan_backend"))
    try:
        yield
    finally:
        _override.reset(token)


def requested() -> str:
    """Return the requested backend: that of ``scan_backend``, else of ``MMTRAIN_SCAN``, else "auto"."""
    return _override.get() or _checked(os.environ.get("MMTRAIN_SCAN", "").strip() or "auto", "MMTRAIN_SCAN")


@torch.compiler.assume_constant_result
def fusing() -> bool:
    """Return whether mixers may run as one fused operator: the value of ``MMTRAIN_FUSE`` (1 or 0), default True."""
    value = os.environ.get("MMTRAIN_FUSE", "").strip() or "1"
    if value not in {"0", "1"}:
        raise UserError(f"MMTRAIN_FUSE={value!r}: must be 1 (mixers as one operator) or 0 (as several operators)")
    return value == "1"


# Under torch.compile this runs during tracing, and the result is a constant of the compiled code.
@torch.compiler.assume_constant_result
def choose(device: str, float64: bool) -> str:
    """Return the backend for given tensors.

    Args:
        device: the device type: "cpu", "cuda" or "meta".
        float64: whether the tensors are float64.

    Raises:
        UserError: if the requested backend is not available or does not support these tensors.
    """
    name = requested()
    if name in _PLAIN:
        log_once(name, logging.INFO, f"selective_scan and causal_conv1d: {name} backend ({_PLAIN[name]}), as requested")
        return name
    if device == "meta":
        return "cpu"  # only shapes and FLOPs are computed, which needs no library
    found, obstacle, cure = _kernels(device, float64, name)
    if found and name in ("auto", found):
        return found
    if name != "auto":
        obstacle = obstacle or f"it does not support {device} tensors"
        raise UserError(f"the {name} backend was requested, but {obstacle}; cure: {cure}, or use MMTRAIN_SCAN=auto")
    log_once(
        obstacle,
        logging.WARNING,
        f"selective_scan and causal_conv1d use the SLOW reference (plain PyTorch, often 100 times slower): {obstacle}. "
        f"Cure: {cure}. To use it without this warning set MMTRAIN_SCAN=reference.",
    )
    return "reference"


def _kernels(device: str, float64: bool, name: str) -> tuple[str, str, str]:
    """Return (backend, "", "") for tensors on a device, or ("", reason, cure) if no kernel can run.

    Args:
        name: the requested backend.
    """
    if float64:
        return "", "the kernels do not support float64 tensors", "use float32 tensors"
    if device == "cuda" or (name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return _gpu_kernels(name)
    if device != "cpu":
        return "", f"there is no kernel for {device} tensors", "move the model to the CPU or to a CUDA GPU"
    if name in ("triton", "mamba_ssm"):
        return "", "the tensors are on the CPU", "move the model to a CUDA GPU"
    if library.load().library is None:
        return "", f"the C++ kernels are not available: {library.load().reason}", build.CURE
    if "cpu" not in _logged:
        kernels = library.loaded()
        settings = f"{kernels.isa}, {torch.get_num_threads()} threads, library {library.load().how}: {kernels.path}"
        log_once("cpu", logging.INFO, f"selective_scan and causal_conv1d: cpu backend ({settings})")
    return "cpu", "", ""


def _gpu_kernels(name: str) -> tuple[str, str, str]:
    if name in ("auto", "mamba_ssm"):
        there, reason = upstream.available("scan")
        if there:
            log_once(
                "mamba_ssm",
                logging.INFO,
                "selective_scan: mamba_ssm backend; the triton backend for inputs that mamba-ssm does not support",
            )
            return "mamba_ssm", "", ""
        if name == "mamba_ssm":
            return "", reason, "install mamba-ssm as described in docs/install.md"
    if not has_triton():
        return "", "Triton is not installed", TRITON_CURE
    log_once("triton", logging.INFO, "selective_scan and causal_conv1d: triton backend")
    return "triton", "", ""


TRITON_CURE = "pip install triton (the CUDA build of torch includes it)"


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def log_triton_instead(name: str, obstacle: str) -> None:
    """Log once that the Triton kernel replaces the upstream kernel of ``name`` because of ``obstacle``.

    Raises:
        UserError: if Triton is not installed.
    """
    if not has_triton():
        raise UserError(f"{name}: {obstacle}, and Triton is not installed; cure: {TRITON_CURE}")
    log_once(f"{name}: {obstacle}", logging.INFO, f"{name}: triton backend, because {obstacle}")


def backend_report() -> dict[str, str | int]:
    """Return a description of the backends for float32 tensors, for ``mmtrain doctor``.

    The CPU library is compiled if it does not exist.

    Returns:
        A dictionary with the keys ``backend`` (for CPU tensors: cpu, reference or parallel), ``requested``,
        ``library`` (path or ""), ``built`` (installed, built on first use, missing), ``reason`` (why the installed
        library is not used, or ""), ``cure`` (or ""), ``isa``, ``threads``, ``gpu`` (the backend for CUDA tensors, or
        why there is none), ``triton`` and ``mamba_ssm`` ("yes", or the reason and the cure).
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
        return "no CUDA GPU found"
    name = requested() if requested() in ("triton", "mamba_ssm") else "auto"
    found, obstacle, cure = _gpu_kernels(name)
    return found or f"{obstacle}; cure: {cure}"
