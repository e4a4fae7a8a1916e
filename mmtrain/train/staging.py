"""A copy of a training state in memory of its own, which a thread can write while the training changes the state.

The training waits for the copy, so the copy is all that it may wait for. The memory is taken once, by a thread at the
start of the run, since the pages of fresh memory take longer to come by than to fill; every copy goes into the same.
From a GPU the memory is pinned, and the copies of all tensors are queued before one wait for all of them. On the CPU
numpy copies, in one thread: torch would share out each of thousands of tensors among all threads, which gains little
on the memory bus, and where the cores are busy, with a save before this or another rank, waits for them every time.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmtrain.parallel.torch_strategy import local

Parts = dict[str, dict[str, Tensor]]


class Stage:
    """Memory for one copy of a state {part: {name: tensor}} on the CPU."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None

    def prepare(self, parts: Parts) -> None:
        """Take the memory for a copy of ``parts`` in the background, and return at once. Values are not looked at."""
        self.close()
        shapes = [(key, local(tensor).shape, tensor.dtype, tensor.is_cuda) for key, tensor in _flat(parts)]

        def take() -> None:
            self._copies.update({key: _memory(shape, dtype, pinned) for key, shape, dtype, pinned in shapes})

        self._thread = threading.Thread(target=take, name="staging")
        self._thread.start()

    @torch.no_grad()
    def copy(self, parts: Parts) -> Parts:
        """A copy of ``parts``, which stays as it is until the next call. A DTensor stays one, its part on the CPU."""
        self.close()
        cuda = False
        for key, tensor in _flat(parts):
            source = local(tensor).detach()
            if not _fits(self._copies.get(key), source):
                self._copies[key] = _memory(source.shape, source.dtype, source.is_cuda)
            if source.is_cuda:
                self._copies[key].copy_(source, non_blocking=True)
                cuda = True
            else:
                np.copyto(self._copies[key].numpy(), source.numpy())
        if cuda:
            torch.cuda.current_stream().synchronize()
        return {
            part: {name: _like(tensor, self._copies[part, name]) for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }

    def close(self) -> None:
        """Wait for the thread of :meth:`prepare`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _flat(parts: Parts) -> list[tuple[tuple[str, str], Tensor]]:
    return [((part, name), tensor) for part, tensors in parts.items() for name, tensor in tensors.items()]


def _fits(memory: Tensor | None, source: Tensor) -> bool:
    return memory is not None and memory.shape == source.shape and memory.dtype == source.dtype


def _memory(shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
    memory = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    memory.numpy().fill(0)  # or the system would look for the pages during the first copy
    return memory


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """``copied`` in the guise of ``tensor``. (``DTensor.from_local`` would move it to the device of the mesh.)"""
    return DTensor(copied, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copied
