"""Find and load the kernel library, and call its kernels. The ctypes structures mirror those of ``csrc/args.h``."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch  # before the library is loaded, so that both share torch's OpenMP runtime
from torch import Tensor

from mmtrain.errors import UserError, nearest
from mmtrain.log import logger
from mmtrain.ops.cpu import build

ISAS = ("auto", "avx512", "avx2", "baseline")
CHUNK = 64  # kChunk: positions between two saved states
CHANNEL_PAD = 16  # kChannelPad: in the saved states, the channels of a group are padded to a multiple of this


class View3(ctypes.Structure):
    """A tensor (batch, channel, position): address, 1 for bfloat16 or 0 for float32, and strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), ("narrow", ctypes.c_int64), ("strides", ctypes.c_int64 * 3)]

    @classmethod
    def of(cls, tensor: Tensor) -> View3:
        return cls(tensor.data_ptr(), tensor.dtype == torch.bfloat16, (ctypes.c_int64 * 3)(*tensor.stride()))


class View4(ctypes.Structure):
    """A float32 tensor (batch, group, state, position): address and strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]

    @classmethod
    def of(cls, tensor: Tensor) -> View4:
        return cls(tensor.data_ptr(), (ctypes.c_int64 * 4)(*tensor.stride()))


class MixView(ctypes.Structure):
    """A tensor (outer batch, inner batch, channel, position), with the fields of :class:`View3`."""

    _fields_ = [("data", ctypes.c_void_p), ("narrow", ctypes.c_int64), ("strides", ctypes.c_int64 * 4)]

    @classmethod
    def of(cls, tensor: Tensor) -> MixView:
        return cls(tensor.data_ptr(), tensor.dtype == torch.bfloat16, (ctypes.c_int64 * 4)(*tensor.stride()))


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's elements, or None if it has no elements."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class ScanArgs(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "dim", "length", "state", "groups", "softplus", "reverse", "threads"),
        *[(name, View3) for name in ("u", "delta")],
        *_pointers("A"),
        *[(name, View4) for name in ("B", "C")],
        *_pointers("D", "bias"),
        ("out", View3),
        *_pointers("states", "initial", "last"),
        *[(name, View3) for name in ("dout", "du", "ddelta")],
        *_pointers("dA"),
        *[(name, View4) for name in ("dB", "dC")],
        *_pointers("dD", "dbias", "dlast", "dinitial"),
    ]


class ConvArgs(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "dim", "length", "width", "silu", "reverse", "threads"),
        ("x", View3),
        *_pointers("weight", "bias"),
        ("out", View3),
        *[(name, View3) for name in ("dout", "dx")],
        *_pointers("dweight", "dbias"),
    ]


class MixArgs(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "inner", "directions", "dim", "length", "state", "rank", "taps", "threads"),
        ("scale", ctypes.c_double),
        *[(name, MixView) for name in ("x", "z")],
        *_pointers("order", "conv", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D"),
        ("out", MixView),
        *_pointers("states"),
        *[(name, MixView) for name in ("dout", "dx", "dz")],
        *_pointers("dconv", "dconv_bias", "dx_proj", "ddt_proj", "ddt_bias", "dA", "dD"),
    ]


class WeightedSumArgs(ctypes.Structure):
    _fields_ = [
        *_integers("count", "size", "threads"),
        *_pointers("inputs", "weight", "out", "dout", "dinputs", "dweight"),
    ]


class DropoutArgs(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "each", "threads", "step", "threshold"),
        ("scale", ctypes.c_double),
        *_pointers("seeds", "x", "out"),
    ]


class MatmulArgs(ctypes.Structure):
    _fields_ = [*_integers("m", "n", "k", "threads"), *_pointers("a", "b", "c")]


class ExpRateArgs(ctypes.Structure):
    _fields_ = [*_integers("count", "threads"), *_pointers("sum")]


ENTRY_POINTS: dict[str, type[ctypes.Structure]] = {
    "scan_forward": ScanArgs,
    "scan_backward": ScanArgs,
    "conv_forward": ConvArgs,
    "conv_backward": ConvArgs,
    "mix_forward": MixArgs,
    "mix_backward": MixArgs,
    "weighted_sum_forward": WeightedSumArgs,
    "weighted_sum_backward": WeightedSumArgs,
    "dropout": DropoutArgs,
    "exp_rate": ExpRateArgs,
    "matmul_tn": MatmulArgs,
}


class StaleLibraryError(Exception):
    """The library was compiled from other sources."""


class KernelLibrary:
    """The loaded shared library.

    Raises:
        OSError: if it cannot be loaded.
        StaleLibraryError: if it was compiled from sources with another hash than ``expected_hash``.
    """

    def __init__(self, path: Path, expected_hash: str | None) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        try:
            for name in ("mmtrain_source_hash", "mmtrain_isa"):
                getattr(library, name).restype = ctypes.c_char_p
            found = library.mmtrain_source_hash().decode()
            if expected_hash is not None and found != expected_hash:
                raise StaleLibraryError(f"{path} was compiled from other sources (hash {found}, not {expected_hash})")
            library.mmtrain_set_isa.argtypes = [ctypes.c_char_p]
            for name, args in ENTRY_POINTS.items():
                getattr(library, f"mmtrain_{name}").argtypes = [ctypes.POINTER(args)]
            if (library.mmtrain_chunk(), library.mmtrain_channel_pad()) != (CHUNK, CHANNEL_PAD):
                raise StaleLibraryError(f"{path} was compiled with another chunk length or padding")
        except AttributeError as error:
            raise StaleLibraryError(f"{path} lacks an entry point: {error}") from error
        self._library = library

    @property
    def isa(self) -> str:
        """The instruction set in use: avx512, avx2 or baseline."""
        return self._library.mmtrain_isa().decode()

    def set_isa(self, name: str) -> None:
        """Use the instruction set ``name``; "auto" selects the best one of this machine.

        Raises:
            UserError: if the name is unknown or the machine does not support the instruction set.
        """
        if name not in ISAS:
            raise UserError(f"MMTRAIN_SCAN_ISA={name!r}: must be one of {', '.join(ISAS)}{nearest(name, ISAS)}")
        if self._library.mmtrain_set_isa(name.encode()):
            raise UserError(f"MMTRAIN_SCAN_ISA={name}: this machine does not support {name}; use auto")

    def call(self, name: str, args: ctypes.Structure) -> None:
        """Run the kernel ``name`` with torch's number of threads.

        Raises:
            MemoryError: if the kernel cannot allocate its buffers.
        """
        args.threads = torch.get_num_threads()
        if getattr(self._library, f"mmtrain_{name}")(ctypes.byref(args)):
            raise MemoryError(f"mmtrain kernel {name}: not enough memory for its buffers")


@dataclass(frozen=True)
class LoadResult:
    """The result of :func:`find_library`.

    Attributes:
        library: the library, or None if there is none.
        how: "installed", "built on first use" or "missing".
        reason: why the installed library is not used, or "".
    """

    library: KernelLibrary | None
    how: str
    reason: str = ""


def find_library() -> LoadResult:
    """Load the installed library if it matches the sources, else that of the cache folder, compiling it if needed."""
    installed = build.INSTALLED
    expected = build.source_hash() if build.SOURCES.is_dir() else None
    reason = f"{installed.name} was not compiled when mmtrain was installed"
    if installed.exists():
        try:
            return LoadResult(KernelLibrary(installed, expected), "installed")
        except (OSError, StaleLibraryError) as error:
            reason = f"the installed library cannot be used: {error}"
    if expected is None:
        return LoadResult(None, "missing", f"{reason}; its sources are not installed either")
    try:
        path = build.build_cached()
        try:
            library = KernelLibrary(path, expected)
        except (OSError, StaleLibraryError):  # a damaged file in the cache
            path.unlink(missing_ok=True)
            library = KernelLibrary(build.build_cached(), expected)
    except (build.BuildError, OSError, StaleLibraryError) as error:
        return LoadResult(None, "missing", f"{reason}; {error}")
    return LoadResult(library, "built on first use", reason)


@functools.cache
def load() -> LoadResult:
    """Call :func:`find_library` once per process and return its result."""
    result = find_library()
    if result.library:
        result.library.set_isa(os.environ.get("MMTRAIN_SCAN_ISA", "auto"))
        if result.how != "installed":
            logger.info("using the kernel library %s, because %s", result.library.path, result.reason)
    return result


def loaded() -> KernelLibrary:
    """Return the library.

    Raises:
        UserError: if it is not available.
    """
    library = load().library
    if library is None:
        raise UserError(f"the C++ kernels are not available: {load().reason}; cure: {build.CURE}")
    return library
