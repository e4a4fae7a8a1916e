"""Reuse of private memory within one process.

The first write to a new memory page costs more than the write itself, so blocks are reused. Memory shared between a
worker and the training process is managed by ``workers.Ring``.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Pool of memory blocks for tensors. A block returns to the pool when its last tensor is deleted."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in the smallest free block that is large enough."""
        size = max(prod(shape), 1) * dtype.itemsize
        fitting = [block for block in self._free if len(block) >= size]
        if fitting:
            block = min(fitting, key=len)
            self._free.remove(block)
        else:
            # All free blocks are too small. Drop the largest of them, so that the pool does not grow without limit.
            if self._free:
                self._free.remove(max(self._free, key=len))
            block = _block(size)
        array = np.frombuffer(block, dtype=np.uint8, count=size)
        weakref.finalize(array, self._free.append, block).atexit = False
        return torch.from_numpy(array).view(dtype)[: prod(shape)].view(*shape)


def _block(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
