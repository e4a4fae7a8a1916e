"""How a kernel is launched: the memory layout of its tensors, the GPU, and the launch configuration.

The kernels read and write channels-last memory. Launch configurations (how many channels, warps and positions at a
time, by kernel, state size and architecture) are looked up in ``launch_table.json``, never searched for while training
runs: a search takes seconds, differs from rank to rank, and may pick another order of summation in another run.
``benchmarks/scan_gpu.py --tune`` measures candidates and rewrites the entries of the architecture at hand.
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
    """With the GPU of its first tensor as the current one: Triton launches there, wherever the tensors are."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run


def minor(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy, with its last dimension but one adjacent in memory."""
    if tensor.stride(-2) == 1 or tensor.shape[-2] == 1:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def returned(dense: Tensor, like: Tensor) -> Tensor:
    """(..., L, D) dense as (..., D, L) in the layout of ``like``."""
    out = dense.transpose(-1, -2)
    return out.contiguous() if like.stride(-1) == 1 and like.stride(-2) != 1 else out


TABLE = Path(__file__).with_name("launch_table.json")
STATES = (1, 4, 16, 64, 256)  # classes of state size: the smallest that holds N
# Positions between two saved states. With N = 16: one byte of saved states a channel, position and direction; in the
# backward 160 KB of scratch a program, about 43 MB for all that run at once on an H100, whose L2 cache has 50 MB.
CHUNK = 64


@dataclass(frozen=True)
class Launch:
    """One launch configuration.

    block_d: channels of a program. warps: of 32 threads. unroll: positions whose loads are issued together (in the
    backward kernel: whose states are in registers together; 1, 2 or 4). fold: the backward kernel first adds this
    many channels within a thread. registers: at most so many a thread; 0: as many as the compiler likes.
    """

    block_d: int
    warps: int
    unroll: int = 1
    fold: int = 1
    registers: int = 0

    def options(self) -> dict[str, int]:
        """As Triton's launch takes them."""
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if self.registers else {})


_override: dict[str, Launch] = {}
_force: dict[str, int] = {}


@functools.cache
def table() -> dict[str, dict[str, dict[str, Launch]]]:
    """architecture ("default", "sm_90", ...) → kernel → class → configuration."""
    raw = json.loads(TABLE.read_text())
    return {
        arch: {
            kernel: {name: Launch(**entry) for name, entry in classes.items()} for kernel, classes in kernels.items()
        }
        for arch, kernels in raw.items()
    }


def state_class(state: int) -> str:
    """The class of a state size, as the table names it.

    Raises:
        ValueError: N is larger than 256.
    """
    for size in STATES:
        if state <= size:
            return str(size)
    raise ValueError(f"the Triton scan takes up to {STATES[-1]} states per channel, not {state}")


def architecture(device: torch.device) -> str:
    """ "sm_90" for an H100, and so on; "default" for what is no CUDA device (the interpreter)."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of this device; 1 for what is no CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def lookup(kernel: str, name: str, arch: str) -> Launch:
    """The configuration of a kernel for a class, of this architecture or else the default."""
    if kernel in _override:
        return _override[kernel]
    for key in (arch, "default"):
        entry = table().get(key, {}).get(kernel, {}).get(name)
        if entry:
            return entry
    raise KeyError(f"{TABLE.name} has no entry for {kernel}, class {name}")


def forced(name: str) -> int | None:
    """A number set by :func:`override`: "chunk", "split_length" or "batches"."""
    return _force.get(name)


def chunk() -> int:
    """Positions between two saved states."""
    return _force.get("chunk", CHUNK)


@contextlib.contextmanager
def override(launches: dict[str, Launch] | None = None, **numbers: int) -> Iterator[None]:
    """Use these configurations and numbers in the ``with`` block, forward and backward alike (tests, tuning)."""
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


def narrower(launch: Launch, channels: int) -> Launch:
    """Not more channels than there are (rounded up to a power of two)."""
    block = launch.block_d
    while block // 2 >= channels and block > 1:
        block //= 2
    return replace(launch, block_d=block, fold=max(1, launch.fold * block // launch.block_d))
