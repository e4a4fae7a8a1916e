"""Batches of a source in the order of the data clock, for any rank, world size and number of workers.

The loader has no state of its own: it can be made again anywhere from the number of samples consumed. Batches are
copied to a GPU one ahead of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from mmtrain.data.core.counts import WORKERS, check_count
from mmtrain.data.core.order import Order, local_positions
from mmtrain.data.core.source import Batch, OnFault, Source, Staged, Streaming
from mmtrain.data.core.workers import Ring, made_batches
from mmtrain.errors import UserError


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    micros: int = 1,
    workers: int = 0,
    window: int = 8,
    prefetch: int = 2,
    device: torch.device | None = None,
    on_fault: OnFault | None = None,
) -> Iterator[Batch]:
    """Micro-batches of ``steps`` optimizer steps from stream position ``start`` (the number of samples consumed).

    ``batch_size`` is the global batch. Yields step 0 micro 0, micro 1, ..., then step 1: each what ``source.fetch``
    gives for ``batch_size / (world * micros)`` samples plus int64 ``position`` (in the stream), ``index`` (of the
    sample) and ``key`` (the uint64 random key's bits). The stream runs on over epoch ends. ``prefetch`` is the number
    of micro-batches each worker keeps ready; ``device`` is where they come. Bit-identical for every number of workers.

    ``on_fault`` is told of every sample that could not be used. With it workers that die are started again; without it
    that is a RuntimeError. Raises UserError for a batch that does not divide and for what the source reports.
    """
    if start < 0 or steps < 0:
        raise ValueError(f"start and steps are 0 or more, got {start} and {steps}")
    local_positions(start, batch_size, rank, world, 0, micros)  # say what is wrong before any worker starts

    def arrays() -> Iterator[np.ndarray]:
        for step in range(steps):
            for micro in range(micros):
                yield local_positions(start + step * batch_size, batch_size, rank, world, micro, micros)

    return _batches(source, Order(source.block_sizes, seed, window), arrays, workers, prefetch, device, on_fault)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device | None = None,
    on_fault: OnFault | None = None,
) -> Iterator[Batch]:
    """Every sample once, in order, without padding: rank r of w takes r, r + w, ... in batches of ``batch_size``.

    The last batch is short, and ranks can differ by one sample, hence by one batch: reduce sums and counts at the end,
    not batch by batch. Adds int64 ``index`` to what ``source.fetch`` gives. Samples that cannot be used are missing
    where the source leaves faults out; a batch without any is left out. ``device``, ``on_fault``: as in training.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation batch size is 1 or more, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"no rank {rank} of {world}")
    length = len(source)

    def arrays() -> Iterator[np.ndarray]:
        for begin in range(rank, length, world * batch_size):
            yield np.arange(begin, min(begin + world * batch_size, length), world, dtype=np.int64)

    return _batches(source, None, arrays, workers, prefetch, device, on_fault)


def _batches(
    source: Source,
    order: Order | None,
    arrays: Callable[[], Iterator[np.ndarray]],
    workers: int,
    prefetch: int,
    device: torch.device | None,
    on_fault: OnFault | None,
) -> Iterator[Batch]:
    """Batches of each array of stream positions, or of sample indices without an order, finished on ``device``."""
    check_count("data.workers", workers, WORKERS)
    pinned = device is not None and device.type == "cuda"
    if isinstance(source, Streaming):  # which makes them itself
        made = source.batches(arrays(), order, workers=workers, prefetch=prefetch, pin_memory=pinned)
        return on_device(made, device)
    if workers < 0:
        raise UserError(f"data.workers={workers}: give 0 (load in the training process) or more")
    made = made_batches(
        source,
        _Maker(source, order),
        arrays,
        workers=workers,
        prefetch=max(1, prefetch),
        pinned=pinned,
        on_fault=on_fault,
    )
    return on_device(made, device, source.finish if isinstance(source, Staged) else None)


class _Maker:
    """Makes a batch in a worker: of stream positions, or of sample indices to evaluate (``order`` None)."""

    def __init__(self, source: Source, order: Order | None) -> None:
        self.source, self.order = source, order
        self.staged = source if isinstance(source, Staged) else None  # the question takes longer than a small batch
        self.ahead: Callable[[list[int]], None] | None = getattr(source, "ahead", None)

    def __call__(self, numbers: np.ndarray, ring: Ring | None) -> Batch:
        if self.order is None:
            batch, index = self._load(numbers, None, ring), torch.from_numpy(numbers)
            kept = batch.pop("kept", None)  # not all of them, where faults are left out
            return {**batch, "index": index if kept is None else index[kept]}
        if self.ahead is not None:
            self.ahead(self.order.coming(int(numbers[-1])))
        indices, keys = self.order.samples(numbers)
        return self._load(indices, keys, ring) | {
            "position": torch.from_numpy(numbers),
            "index": torch.from_numpy(indices),
            "key": torch.from_numpy(keys.view(np.int64)),
        }

    def _load(self, indices: np.ndarray, keys: np.ndarray | None, ring: Ring | None) -> Batch:
        if self.staged is None:
            return dict(self.source.fetch(indices, keys))
        if ring is None:
            return dict(self.staged.load(indices, keys))
        batch = self.staged.load(indices, keys, ring.empty)
        return {**batch, **{name: ring.place(batch[name]) for name in self.staged.moved if len(batch[name])}}


def on_device(
    batches: Iterable[Batch], device: torch.device | None, finish: Callable[[Batch], Batch] | None = None
) -> Iterator[Batch]:
    """Each batch on ``device`` (None: where it is) and finished there.

    For CUDA both happen on a stream of their own, one batch ahead: give batches in pinned memory.
    """
    finish = finish or (lambda batch: batch)
    if device is None or device.type != "cuda":
        yield from map(finish, batches)
        return
    side = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            sent = finish({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        if ahead is not None:
            yield _handed_over(ahead, side)
        ahead = sent
    if ahead is not None:
        yield _handed_over(ahead, side)


def _handed_over(batch: Batch, side: torch.cuda.Stream) -> Batch:
    """The stream that computes waits for the one that copied, and memory is not used again before it is done."""
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    for tensor in batch.values():
        tensor.record_stream(current)
    return batch
