"""Which implementation runs: the C++ kernels or one in plain PyTorch. The choice is told once, never silent.

=============  ==================================================================================
``cpu``        C++ kernels (``csrc/``): CPU tensors of float32, bfloat16, float16
``reference``  plain PyTorch: any device and float dtype, slow
``parallel``   plain PyTorch as an associative scan: the same, in log2 L steps; what exported models are made of
=============  ==================================================================================

Environment: ``MMTRAIN_SCAN=auto|reference|parallel|cpu`` overrides the choice (``scan_backend`` overrides that);
``MMTRAIN_SCAN_ISA=auto|avx512|avx2|baseline`` narrows the instruction set; ``MMTRAIN_CACHE`` names the folder for a
library built on first use. ``MMTRAIN_FUSE=0`` composes mixers of several operators instead of one.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Iterator

import torch

from mmtrain.errors import UserError, nearest
from mmtrain.ops import build, library

logger = logging.getLogger("mmtrain")

BACKENDS = ("auto", "reference", "parallel", "cpu")
_PLAIN = {"reference": "plain PyTorch", "parallel": "plain PyTorch, associative scan"}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("mmtrain_scan_backend", default=None)
_told: set[str] = set()


def _tell_once(key: str, level: int, message: str) -> None:
    if key not in _told:
        _told.add(key)
        logger.log(level, message)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"{source}: {name!r} is none of {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    return name


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Use one backend for every scan and convolution in the ``with`` block: "auto", "reference", "parallel" or "cpu".

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


_fusing: contextvars.ContextVar[bool | None] = contextvars.ContextVar("mmtrain_fusing", default=None)


@contextlib.contextmanager
def fusion(enabled: bool) -> Iterator[None]:
    """Whether mixers run as one operator in the ``with`` block, where there is one, or composed of several."""
    token = _fusing.set(enabled)
    try:
        yield
    finally:
        _fusing.reset(token)


@torch.compiler.assume_constant_result
def fusing() -> bool:
    """What ``fusion`` says, else ``MMTRAIN_FUSE`` (1 or 0), else True."""
    chosen = _fusing.get()
    if chosen is not None:
        return chosen
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
        _tell_once(
            name, logging.INFO, f"selective_scan and causal_conv1d: {name} backend ({_PLAIN[name]}), as asked for"
        )
        return name
    if device == "meta":
        return "cpu"  # shapes and FLOPs only: the kernel's rules, no library needed
    if device != "cpu":
        obstacle, cure = f"there is no kernel for {device} tensors", "move the model to the CPU"
    elif float64:
        obstacle, cure = "the C++ kernels compute in float32, and the tensors are float64", "use float32 tensors"
    elif library.load().library is None:
        obstacle, cure = f"the C++ kernels are not available: {library.load().reason}", build.CURE
    else:
        if "cpu" not in _told:
            kernels = library.loaded()
            settings = f"{kernels.isa}, {torch.get_num_threads()} threads, library {library.load().how}: {kernels.path}"
            _tell_once("cpu", logging.INFO, f"selective_scan and causal_conv1d: cpu backend ({settings})")
        return "cpu"
    if name == "cpu":
        raise UserError(f"the cpu backend was asked for, but {obstacle}; cure: {cure}, or ask for auto")
    _tell_once(
        obstacle,
        logging.WARNING,
        f"selective_scan and causal_conv1d run the SLOW reference (plain PyTorch, often 100 times slower): {obstacle}. "
        f"Cure: {cure}. To accept it silently set MMTRAIN_SCAN=reference.",
    )
    return "reference"


def backend_report() -> dict[str, str | int]:
    """What runs for float32 tensors on the CPU, for ``mmtrain doctor``. Builds the library if it was never built.

    Keys: ``backend`` (cpu, reference or parallel), ``requested``, ``library`` (path or ""), ``built`` (installed,
    built on first use, missing), ``reason`` (why it is not the installed one, or ""), ``cure`` (or ""), ``isa``,
    ``threads``.
    """
    result = library.load()
    available = result.library is not None
    return {
        "backend": requested() if requested() in _PLAIN else "cpu" if available else "reference",
        "requested": requested(),
        "library": str(result.library.path) if result.library else "",
        "built": result.how,
        "reason": result.reason,
        "cure": "" if available else build.CURE,
        "isa": result.library.isa if result.library else "",
        "threads": torch.get_num_threads(),
    }
