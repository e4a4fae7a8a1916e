"""What the loaders need of a data source, and what becomes of samples that cannot be used.

A source implements :class:`Source`, and :class:`Staged` or :class:`Streaming` where that is faster. What it has to
leave out it reports as a :class:`Fault`; a :class:`FaultLog` counts these, writes them down and limits them.
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
    """An indexable set of samples, stored in blocks (shards) which are cheap to read together."""

    @property
    def block_sizes(self) -> Sequence[int]:
        """Samples in each block; sample indices run through block 0, then block 1, ..."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
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

    def load(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None, empty: Empty = ...) -> Batch:
        """As ``fetch``, but what only ``finish`` understands: made by a worker, the tensors in ``moved`` best in
        memory from ``empty(shape, dtype)``.
        """
        ...

    def finish(self, batch: Batch) -> Batch:
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
    ) -> Iterator[Batch]:
        """What ``loader.train_batches`` yields for each array of stream positions in ``order``; with ``order=None``
        what ``loader.eval_batches`` yields for each array of sample indices. Closing the iterator stops what it runs.
        """
        ...


@dataclass(frozen=True)
class Fault:
    """Sample ``index`` of a source (-1: a whole shard, which held about ``samples``) cannot be used."""

    index: int
    where: str
    reason: str
    samples: int = 1


#: Is told of every sample that cannot be used.
OnFault = Callable[[Fault], None]


class FaultLog:
    """The faults of one split: each once, in a line of this rank's ``file``, and limited over all ranks.

    Args:
        file: JSON lines. What is in it and in its neighbours already, of other ranks and of the job before, counts.
        split: its name, for the lines.
        total: samples of the split that are there.
        most: the largest part of the split that may be missing.
    """

    def __init__(self, file: Path, split: str, total: int, most: float) -> None:
        self.file, self.split, self.total, self.most = file, split, total, most
        self._mine = set(_read(file, split))

    def add(self, fault: Fault) -> None:
        """Note a fault. Raises UserError when they become too many."""
        if (fault.index, fault.where) in self._mine:
            return
        self._mine.add((fault.index, fault.where))
        logger.warning("%s: %s; left out (data.faults=skip)", fault.where, fault.reason)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.file, {"split": self.split, **asdict(fault)})
        missing, total = self.missing()
        if missing > self.most * total:
            raise UserError(
                f"{missing} of {total} samples of the {self.split} split cannot be used, the last one: "
                f"{fault.where}: {fault.reason}. That is more than data.max_faults={self.most:g} of them: repair the "
                f"data (all are listed in {self.file.parent}), or raise data.max_faults"
            )

    def missing(self) -> tuple[int, int]:
        """Samples that cannot be used, of all that there should be, as far as any rank has seen."""
        seen: dict[tuple[int, str], int] = {}
        for file in self.file.parent.glob(f"{self.file.stem.rpartition('_')[0]}_*{self.file.suffix}"):
            seen |= _read(file, self.split)
        lost = sum(samples for (index, _), samples in seen.items() if index < 0)
        return sum(seen.values()), self.total + lost


def _read(file: Path, split: str) -> dict[tuple[int, str], int]:
    """Samples that each fault in ``file`` stands for, as far as its lines can be read."""
    found = {}
    for entry in read_json_lines(file):
        with suppress(KeyError, TypeError, ValueError):
            if entry["split"] == split:
                found[int(entry["index"]), str(entry["where"])] = int(entry["samples"])
    return found
