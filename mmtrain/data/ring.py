"""Shared memory of a loader's worker that is used again: fresh pages would cost more than what is sent in them.

A worker has a few batches on their way at most, so it writes them into as many slots, in turn. The training process
keeps the slots mapped, and is done with one before the worker comes round to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


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
