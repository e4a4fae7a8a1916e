"""What the loaders need of a data source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtrain.data.core.order import Order


@runtime_checkable
class Source(Protocol):
    """An indexable set of samples, stored in blocks (shards) which are cheap to read together."""

    @property
    def block_sizes(self) -> Sequence[int]:
        """Samples in each block; sample indices run through block 0, then block 1, ..."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> dict[str, Tensor]:
        """A collated batch: every tensor has ``len(indices)`` as its first dimension, in the order of ``indices``.

        ``keys`` are the samples' random keys ``mix64(seed, epoch, index)`` in training, None in evaluation: whatever
        is random about a sample must be a function of its key alone.
        """
        ...


#: Gives an uninitialised tensor of a shape and a dtype.
Empty = Callable[[Sequence[int], "torch.dtype"], "Tensor"]


@runtime_checkable
class Staged(Protocol):
    """A source that makes its batches in two halves: what moves between processes and devices is small.

    ``fetch`` is ``finish`` of ``load``. ``moved`` names the large tensors of ``load``, whose memory is used again as
    soon as ``finish`` is done: it copies them.
    """

    moved: Sequence[str]

    def load(
        self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None, empty: Empty = ...
    ) -> dict[str, Tensor]:
        """As ``fetch``, but what only ``finish`` understands: made by a worker, the tensors in ``moved`` best in
        memory from ``empty(shape, dtype)``.
        """
        ...

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as ``fetch`` gives it, on the device where ``load``'s tensors are by now."""
        ...


@runtime_checkable
class Streaming(Source, Protocol):
    """A source that makes its batches itself, in place of torch's DataLoader."""

    def batches(
        self,
        numbers: Iterator[NDArray[np.int64]],
        order: Order | None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """What ``loader.train_batches`` yields for each array of stream positions in ``order``; with ``order=None``
        what ``loader.eval_batches`` yields for each array of sample indices. Closing the iterator stops what it runs.
        """
        ...
