"""Launch configurations of the kernels, and helpers for the memory layout of tensors and for the GPU.

The kernels read and write channels-last memory. A launch configuration contains the numbers of channels, warps and
positions that a program processes. It depends on kernel, state size and architecture, and is read from
``launch_table.json``. There is no automatic tuning during training: it takes seconds, its result differs between ranks,
and another configuration may change the order of summation. ``benchmarks/scan_gpu.py --tune`` measures candidates and
rewrites the entries of the present architecture.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate ``function`` to run with the GPU of its first tensor as the current device.

    Triton launches kernels on the current device, which may not be that of the tensors.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run


def minor(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a copy of it, with stride 1 in the second-last dimension."""
    if tensor.stride(-2) == 1 or tensor.shape[-2] == 1:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def returned(dense: Tensor, like: Tensor) -> Tensor:
    """Transpose a contiguous tensor (..., L, D) to (..., D, L), in the memory layout of ``like``."""
    out = dense.transpose(-1, -2)
    return out.contiguous() if like.stride(-1) == 1 and like.stride(-2) != 1 else out


TABLE = Path(__file__).with_name("launch_table.json")
STATES = (1, 4, 16, 64, 256)  # classes of state sizes; N belongs to the smallest class that is at least N
# Positions between two saved states. With N = 16, saved states take one byte per channel, position and direction. The
# backward kernel needs 160 KB of scratch per program, about 43 MB for all concurrent programs on an H100 (L2: 50 MB).
CHUNK = 64


@dataclass(frozen=True)
class Launch:
    """One launch configuration.

    Attributes:
        block_d: channels per program.
        warps: warps per program (of 32 threads).
        unroll: positions whose loads are issued together. In the backward kernel: positions whose states are in
            registers at the same time, 1, 2 or 4.
        fold: number of channels that the backward kernel first adds within a thread.
        registers: maximum number of registers per thread; 0: chosen by the compiler.
    """

    block_d: int
    warps: int
    unroll: int = 1
    fold: int = 1
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Return the launch options of Triton."""
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if self.registers else {})


_override: dict[str, Launch] = {}
_force: dict[str, int] = {}


@functools.cache
def table() -> dict[str, dict[str, dict[str, Launch]]]:
    """Return the table: architecture ("default", "sm_90", ...) → kernel → class → launch configuration."""
    raw = json.loads(TABLE.read_text())
    return {
        arch: {
            kernel: {name: Launch(**entry) for name, entry in classes.items()} for kernel, classes in kernels.items()
        }
        for arch, kernels in raw.items()
    }


def state_class(state: int) -> str:
    """Return the name of the class of a state size in the table.

    Raises:
        ValueError: if the state size is larger than 256.
    """
    for size in STATES:
        if state <= size:
            return str(size)
    raise ValueError(f"state size {state}: the Triton kernels support at most {STATES[-1]}")


def architecture(device: torch.device) -> str:
    """Return the architecture of a CUDA device, such as "sm_90"; "default" for other devices (the interpreter)."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device; 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def lookup(kernel: str, name: str, arch: str) -> Launch:
    """Return the launch configuration of a kernel for a class and an architecture, or that of "default".

    Raises:
        KeyError: if the table has none.
    """
    if kernel in _override:
        return _override[kernel]
    for key in (arch, "default"):
        entry = table().get(key, {}).get(kernel, {}).get(name)
        if entry:
            return entry
    raise KeyError(f"{TABLE.name} has no entry for {kernel}, class {name}")


def forced(name: str) -> int | None:
    """Return a number set by :func:`override` ("chunk", "split_length", "segment" or "batches"), or None."""
    return _force.get(name)


def chunk() -> int:
    """Return the number of positions between two saved states."""
    return _force.get("chunk", CHUNK)


@contextlib.contextmanager
def override(launches: dict[str, Launch] | None = None, **numbers: int) -> Iterator[None]:
    """Use other launch configurations and numbers in the ``with`` block. For tests and tuning.

    Args:
        launches: configurations by kernel name.
        numbers: values of :func:`forced` by name.
    """
    before = dict(_override), dict(_force)
    _override.update(launches or {})
    _force.update(numbers)
    try:
        yield
    finally:
        _override.clear()
        _force.clear()
        _override.update(before[0])
        _force.update(before[1])


def limit_channels(launch: Launch, channels: int) -> Launch:
    """Limit the channels per program to ``channels``, rounded up to a power of two."""
    block = launch.block_d
    while block // 2 >= channels and block > 1:
        block //= 2
    return replace(launch, block_d=block, fold=max(1, launch.fold * block // launch.block_d))
