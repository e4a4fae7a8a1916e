"""Memory of this process that is used again, because fresh pages cost more than what is written to them.

Shared memory between a worker and the training process is ``workers.Ring``.
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
    """Memory that is lent as tensors and comes back by itself when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, on the smallest free block that holds it."""
        size = max(prod(shape), 1) * dtype.itemsize
        fitting = [block for block in self._free if len(block) >= size]
        if fitting:
            block = min(fitting, key=len)
            self._free.remove(block)
        else:
            # the largest of those that are too small is given up for it: what is held stays near what is used at once
            if self._free:
                self._free.remove(max(self._free, key=len))
            block = _block(size)
        lent = np.frombuffer(block, dtype=np.uint8, count=size)
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype)[: prod(shape)].view(*shape)


def _block(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
