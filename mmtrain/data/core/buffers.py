"""Memory that is used again: fresh pages cost more than what is written to them.

Shared memory of a loader's worker that is used again: fresh pages would cost more than what is sent in them.

A worker has a few batches on their way at most, so it writes them into as many slots, in turn. The training process
keeps the slots mapped, and is done with one before the worker comes round to it.
"""

from __future__ import annotations

import mmap
import weakref
from collections import OrderedDict
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


class Ring:
    """The slots of one worker. Made before the workers are, filled in each by what it sends."""

    def __init__(self, slots: int) -> None:
        self.slots: list[Tensor | None] = [None] * slots
        self.turn = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised, in the next slot; what was there is gone."""
        size = prod(shape) * dtype.itemsize
        slot = self.slots[self.turn]
        if slot is None or slot.numel() < size:
            slot = self.slots[self.turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        self.turn = (self.turn + 1) % len(self.slots)
        return slot[:size].view(dtype).view(*shape)

    def place(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself where it is from ``empty``, else a copy in the next slot."""
        where = tensor.untyped_storage().data_ptr()
        if any(slot is not None and slot.untyped_storage().data_ptr() == where for slot in self.slots):
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


class Mapped:
    """What the training process has mapped of all rings, ``most`` slots: torch finds a storage again while it lives."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._storages: OrderedDict[int, torch.UntypedStorage] = OrderedDict()

    def keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage
        self._storages.move_to_end(storage.data_ptr())
        while len(self._storages) > self.most:
            self._storages.popitem(last=False)
