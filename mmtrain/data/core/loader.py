"""Batches of a data source for any rank, world size and number of workers.

The order of samples is the one of ``order``. The loader has no state: the number of samples consumed is enough to
resume it. The copy of a batch to a GPU overlaps with the computation on the batch before it.
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
    """Yield this rank's micro-batches of ``steps`` optimizer steps, from stream position ``start``.

    The stream continues over the ends of epochs. The batches are bit-identical for every number of workers.

    Args:
        batch_size: global batch size.
        start: number of samples consumed so far.
        micros: micro-batches per step.
        window: shuffle window, in shards.
        prefetch: micro-batches that each worker keeps ready.
        device: device of the yielded tensors (None: leave them in CPU memory).
        on_fault: called for each damaged sample. If given, workers that die are restarted; otherwise their death
            raises a RuntimeError.

    Yields:
        Step 0 micro-batch 0, 1, ..., then step 1, and so on: the result of ``source.fetch`` for
        ``batch_size / (world * micros)`` samples, plus int64 tensors ``position`` (in the stream), ``index`` (of the
        sample) and ``key`` (the bits of the uint64 random key).

    Raises:
        UserError: if ``batch_size`` is not divisible, or the source reports an error.
    """
    if start < 0 or steps < 0:
        raise ValueError(f"start and steps must be 0 or more, got {start} and {steps}")
    local_positions(start, batch_size, rank, world, 0, micros)  # report a bad batch size before any worker starts

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
    """Yield every sample once, in order and without padding.

    Rank r of w evaluates samples r, r + w, ... in batches of ``batch_size``. The last batch may be smaller, and ranks
    may differ by one sample and therefore by one batch: reduce sums and counts over ranks at the end, not per batch.
    Each batch is the result of ``source.fetch`` plus an int64 tensor ``index``. A source that skips damaged samples
    yields smaller batches; empty batches are not yielded.

    Args:
        batch_size: samples of a batch on this rank.
        prefetch, device, on_fault: as in ``train_batches``.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation batch size must be at least 1, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
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
    """Yield a batch on ``device`` for each array of stream positions (``order`` None: of sample indices)."""
    check_count("data.workers", workers, WORKERS)
    pinned = device is not None and device.type == "cuda"
    if isinstance(source, Streaming):
        made = source.batches(arrays(), order, workers=workers, prefetch=prefetch, pin_memory=pinned)
        return on_device(made, device)
    if workers < 0:
        raise UserError(f"data.workers={workers}: must be at least 0 (0: load in the training process)")
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
    """Load a batch in a worker, given stream positions or, for evaluation (``order`` None), sample indices."""

    def __init__(self, source: Source, order: Order | None) -> None:
        self.source, self.order = source, order
        self.staged = source if isinstance(source, Staged) else None  # isinstance is too slow to call for each batch
        self.ahead: Callable[[list[int]], None] | None = getattr(source, "ahead", None)

    def __call__(self, numbers: np.ndarray, ring: Ring | None) -> Batch:
        if self.order is None:
            batch, index = self._load(numbers, None, ring), torch.from_numpy(numbers)
            kept = batch.pop("kept", None)  # present if damaged samples were skipped
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
    """Copy each batch to ``device`` (None: no copy) and apply ``finish`` there.

    On CUDA, both run in a separate stream, one batch ahead. The input batches should be in pinned memory.
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
    """Let the current stream wait for the copy, and keep the memory until the current stream has used it."""
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    for tensor in batch.values():
        tensor.record_stream(current)
    return batch
