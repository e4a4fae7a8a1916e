"""The order of samples, as a pure function of (seed, epoch, position).

The order does not depend on workers, ranks or restarts, so a run only has to save the number of samples consumed.
Blocks (shards) are shuffled once per epoch. Samples are then shuffled fully inside each window of consecutive shuffled
blocks. Reading therefore stays sequential enough to stream, and no global permutation is needed.

NumPy does not guarantee that its generators give the same numbers in every version, so the order is computed with a
hash that is defined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

_BLOCK_TAG = 0x626C6F636B  # keeps the hashes of blocks, samples and per-sample randomness apart
_SAMPLE_TAG = 0x73616D706C65
_MASK = (1 << 64) - 1


def mix64(*values: int | np.integer | np.ndarray) -> UInt64s:
    """Hash integers (negative ones modulo 2^64) to uint64, element by element with broadcasting.

    The state starts at 0. Each value is combined with the state by XOR, followed by one step of splitmix64 (Steele, Lea
    & Flood 2014), so ``mix64(0)`` is the first output of splitmix64 with seed 0. Each step is a bijection: for fixed
    leading values, different last values never collide. Scalars return an array of shape (1,).
    """
    state: Any = 0
    for value in values:
        # Python integers are faster than arrays with one element.
        number = int(value) & _MASK if isinstance(value, int | np.integer) else _as_uint64(value)
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state = state ^ (state >> 31)
    return np.atleast_1d(np.asarray(state, dtype=np.uint64))


def _as_uint64(values: np.ndarray) -> UInt64s:
    if values.dtype.kind not in "iu":
        raise TypeError(f"mix64: values must be integers, got {values.dtype}")
    return np.atleast_1d(values.astype(np.int64) if values.dtype.kind == "i" else values).astype(np.uint64)


class _Epoch(NamedTuple):
    """The shuffled blocks of one epoch."""

    blocks: Int64s  # (number of blocks,) block numbers in shuffled order
    ends: Int64s  # (number of windows,) position in the epoch at which each window ends


class Order:
    """The order of ``sum(block_sizes)`` samples in each epoch.

    Args:
        block_sizes: samples in each block. Samples are numbered block by block.
        seed: seed of the shuffle.
        window: shuffle window: number of consecutive shuffled blocks within which samples are shuffled fully.

    Raises:
        UserError: if there are no samples, or ``window`` is below 1.
    """

    def __init__(self, block_sizes: Sequence[int], seed: int, window: int = 8) -> None:
        self.sizes: Int64s = np.asarray(block_sizes, dtype=np.int64).reshape(-1)
        if (self.sizes < 0).any() or int(self.sizes.sum()) < 1:
            raise UserError("the train split contains no samples; check data.root or data.path")
        if window < 1:
            raise UserError(f"data.shuffle_window={window}: must be at least 1 (number of shards)")
        self.seed, self.window = int(seed), int(window)
        self.starts: Int64s = np.cumsum(self.sizes) - self.sizes
        self._length = int(self.sizes.sum())
        self._epoch = lru_cache(2)(self._shuffled_blocks)
        self._window = lru_cache(4)(self._shuffled_samples)

    def __len__(self) -> int:
        return self._length

    def lookup(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return epochs and sample indices (int64, same shape as ``positions``) at stream positions q ≥ 0.

        With N samples, q is position q % N of epoch q // N. The stream continues over the ends of epochs, so no
        incomplete last batch is ever dropped.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and int(positions.min()) < 0:
            raise ValueError(f"stream positions must be 0 or more, got {int(positions.min())}")
        epochs, offsets = np.divmod(positions, self._length)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            ends = self._epoch(epoch).ends
            # side="right" skips windows that contain only empty blocks
            windows = np.searchsorted(ends, offsets[in_epoch], side="right")
            found = np.empty(windows.shape, dtype=np.int64)
            for number in np.unique(windows).tolist():
                inside = windows == number
                begin = int(ends[number - 1]) if number else 0
                found[inside] = self._window(epoch, number)[offsets[in_epoch][inside] - begin]
            indices[in_epoch] = found
        return epochs, indices

    def samples(self, positions: Int64s) -> tuple[Int64s, UInt64s]:
        """Return the sample indices at stream positions, and their random keys ``mix64(seed, epoch, index)``."""
        epochs, indices = self.lookup(positions)
        # Most batches lie within one epoch, and hashing a scalar is faster than hashing an array.
        epoch = int(epochs[0]) if len(epochs) and epochs[0] == epochs[-1] else epochs
        return indices, mix64(self.seed, epoch, indices)

    def coming(self, position: int) -> list[int]:
        """Return the blocks of the next window that should be prefetched at stream position ``position``.

        A new window needs all its blocks at once. To spread the reads, the number of blocks returned grows in
        proportion to the samples already consumed from the current window.
        """
        epoch, offset = divmod(position, self._length)
        ends = self._epoch(epoch).ends
        number = int(np.searchsorted(ends, offset, side="right"))
        begin = int(ends[number - 1]) if number else 0
        used = (offset - begin) / max(int(ends[number]) - begin, 1)
        if number + 1 < len(ends):
            blocks = self._epoch(epoch).blocks[(number + 1) * self.window : (number + 2) * self.window]
        else:
            blocks = self._epoch(epoch + 1).blocks[: self.window]
        found: list[int] = blocks[: int(used * len(blocks)) + 1].tolist()
        return found

    def _shuffled_blocks(self, epoch: int) -> _Epoch:
        blocks = np.argsort(
            mix64(self.seed, epoch, _BLOCK_TAG, np.arange(len(self.sizes), dtype=np.int64)), kind="stable"
        )
        first = np.arange(0, len(blocks), self.window)
        return _Epoch(blocks.astype(np.int64), np.cumsum(np.add.reduceat(self.sizes[blocks], first)))

    def _shuffled_samples(self, epoch: int, number: int) -> Int64s:
        """Return the sample indices of window ``number`` in shuffled order."""
        blocks = self._epoch(epoch).blocks[number * self.window : (number + 1) * self.window]
        samples = np.concatenate(
            [np.arange(self.starts[b], self.starts[b] + self.sizes[b], dtype=np.int64) for b in blocks]
        )
        return samples[np.argsort(mix64(self.seed, epoch, _SAMPLE_TAG, samples), kind="stable")]

    def __reduce__(self) -> tuple[type[Order], tuple[object, ...]]:
        return Order, (self.sizes, self.seed, self.window)  # without the caches, which are cheap to refill


def local_positions(
    start: int, global_batch: int, rank: int, world: int, micro: int = 0, micros: int = 1
) -> NDArray[np.int64]:
    """Return the stream positions (int64) of one rank's micro-batch in the global batch that begins at ``start``.

    They are ``start + p`` for all p in 0 .. global_batch - 1 with p ≡ micro·world + rank (mod world·micros). Together,
    all ranks and micro-batches cover the global batch exactly once, for every world size.

    Raises:
        UserError: if ``global_batch`` is not a multiple of world · micros.
    """
    if not (0 <= rank < world and 0 <= micro < micros):
        raise ValueError(f"rank {rank} of {world} or micro-batch {micro} of {micros} is out of range")
    parts = world * micros
    if global_batch < 1 or global_batch % parts:
        low = global_batch // parts * parts
        fitting = " or ".join(str(size) for size in (low, low + parts) if size > 0)
        raise UserError(
            f"train.batch_size={global_batch}: the global batch is not divisible by {world} rank(s) × {micros} "
            f"micro-batch(es) = {parts}. Use a multiple of {parts}, for example {fitting}"
        )
    return np.arange(micro * world + rank, global_batch, parts, dtype=np.int64) + int(start)


def mixing_figure(order: Order, epoch: int = 0) -> float:
    """Measure how well one epoch is shuffled: 1 for a uniform shuffle, 0 for no shuffle.

    The figure is the mean distance in the epoch between samples that are adjacent in a shard, scaled so that a uniform
    shuffle of N samples (mean distance about N / 3) gives 1. A shuffle of whole blocks gives about 0, and windows of w
    out of W blocks give about w / W. Time and memory are O(N).
    """
    n = len(order)
    _, indices = order.lookup(np.arange(n, dtype=np.int64) + n * epoch)
    positions = np.empty(n, dtype=np.int64)
    positions[indices] = np.arange(n)
    same_block = np.diff(np.repeat(np.arange(len(order.sizes)), order.sizes)) == 0
    if n < 3 or not same_block.any():
        return 1.0
    # Two positions of a uniform permutation are (N + 1) / 3 apart on average, and at least 1.
    return float((np.abs(np.diff(positions))[same_block].mean() - 1) / ((n + 1) / 3 - 1))
