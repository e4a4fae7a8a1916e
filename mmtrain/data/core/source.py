"""The interface of a data source, and the log of damaged samples.

A source implements :class:`Source`, and also :class:`Staged` or :class:`Streaming` if that is faster. It reports each
sample that it skips as a :class:`Fault`. A :class:`FaultLog` records the faults and stops the run if there are too
many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError
from mmtrain.files import append_json_line, read_json_lines
from mmtrain.log import logger

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtrain.data.core.order import Order

Batch = dict[str, "Tensor"]


@runtime_checkable
class Source(Protocol):
    """An indexable set of samples, stored in blocks (shards) whose samples are cheap to read together."""

    @property
    def block_sizes(self) -> Sequence[int]:
        """Number of samples in each block. Sample indices count through block 0, then block 1, and so on."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        """Return a collated batch of the samples ``indices``, in this order.

        Args:
            indices: sample indices (B,).
            keys: random keys ``mix64(seed, epoch, index)`` of the samples (B,) in training, None in evaluation. All
                randomness of a sample must be a function of its key alone.

        Returns:
            Tensors whose first dimension is B.
        """
        ...


#: Function that returns an uninitialised tensor of a shape and a dtype.
Empty = Callable[[Sequence[int], "torch.dtype"], "Tensor"]


@runtime_checkable
class Staged(Protocol):
    """A source that produces batches in two stages, so that little data moves between processes and devices.

    ``fetch`` is equivalent to ``finish(load(...))``. ``moved`` names the large tensors of ``load``. Their memory is
    reused as soon as ``finish`` returns, so ``finish`` must copy them.
    """

    moved: Sequence[str]

    def load(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None, empty: Empty = ...) -> Batch:
        """Return an intermediate batch for ``finish``; called in a worker.

        The tensors named in ``moved`` should be allocated with ``empty(shape, dtype)``, which avoids a copy.
        """
        ...

    def finish(self, batch: Batch) -> Batch:
        """Return the batch as ``fetch`` does, on the device of the tensors in ``batch``."""
        ...


@runtime_checkable
class Streaming(Source, Protocol):
    """A source that produces its batches itself, without torch's DataLoader."""

    def batches(
        self,
        numbers: Iterator[NDArray[np.int64]],
        order: Order | None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Yield a batch for each array in ``numbers``, as ``loader.train_batches`` does for stream positions.

        Without ``order``, the numbers are sample indices, and the batches are those of ``loader.eval_batches``. Closing
        the iterator stops its threads.
        """
        ...


@dataclass(frozen=True)
class Fault:
    """A sample, or a whole shard, that cannot be used."""

    index: int  # of the sample in its source; -1 for a whole shard
    where: str  # file and sample, for messages
    reason: str
    samples: int = 1  # lost samples; an estimate for a shard


#: Function that is called for every damaged sample.
OnFault = Callable[[Fault], None]


class FaultLog:
    """Log of the faults of one split, with a limit over all ranks.

    Args:
        file: JSON lines file of this rank, one line per fault. Faults that this file and the files of the other ranks
            contain already, for example from an earlier job, are counted too.
        split: name of the split.
        total: number of readable samples of the split.
        most: largest allowed fraction of lost samples.
    """

    def __init__(self, file: Path, split: str, total: int, most: float) -> None:
        self.file, self.split, self.total, self.most = file, split, total, most
        self._logged = set(_read(file, split))

    def add(self, fault: Fault) -> None:
        """Log a fault unless it is logged already. Raise UserError if too many samples are lost."""
        if (fault.index, fault.where) in self._logged:
            return
        self._logged.add((fault.index, fault.where))
        logger.warning("%s: %s; skipped (data.faults=skip)", fault.where, fault.reason)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.file, {"split": self.split, **asdict(fault)})
        missing, total = self.missing()
        if missing > self.most * total:
            raise UserError(
                f"{missing} of {total} samples of the {self.split} split cannot be used, most recently "
                f"{fault.where}: {fault.reason}. This is more than the allowed fraction data.max_faults={self.most:g}. "
                f"Repair the data (all faults are listed in {self.file.parent}), or increase data.max_faults"
            )

    def missing(self) -> tuple[int, int]:
        """Return how many samples could not be read, on whichever rank, and how many samples there are."""
        seen: dict[tuple[int, str], int] = {}
        for file in self.file.parent.glob(f"{self.file.stem.rpartition('_')[0]}_*{self.file.suffix}"):
            seen |= _read(file, self.split)
        lost = sum(samples for (index, _), samples in seen.items() if index < 0)
        return sum(seen.values()), self.total + lost


def _read(file: Path, split: str) -> dict[tuple[int, str], int]:
    """Return (index, where) → lost samples for each fault in ``file``. Unreadable lines are skipped."""
    found = {}
    for entry in read_json_lines(file):
        with suppress(KeyError, TypeError, ValueError):
            if entry["split"] == split:
                found[int(entry["index"]), str(entry["where"])] = int(entry["samples"])
    return found
