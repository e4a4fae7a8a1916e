"""The data clock: which sample comes at which position, as a pure function of (seed, epoch, position).

Nothing here depends on workers, ranks or restarts, so the one number that a run has to save is how many samples it has
consumed. Blocks (shards) are shuffled once an epoch; samples are then shuffled fully inside each window of consecutive
shuffled blocks. That keeps reading sequential enough to stream and needs no global permutation.

numpy's generators do not promise the same stream in every version, so the order rests on a hash of our own.
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

    The state starts at 0; each value is xored in and passed through one step of splitmix64 (Steele, Lea & Flood 2014),
    so ``mix64(0)`` is the first output of splitmix64 seeded with 0. Each step is a bijection: for fixed leading values,
    different last values never collide. Scalars give an array of shape (1,).
    """
    state: Any = 0
    for value in values:
        # plain integers are faster than arrays of one
        number = int(value) & _MASK if isinstance(value, int | np.integer) else _as_uint64(value)
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state = state ^ (state >> 31)
    return np.atleast_1d(np.asarray(state, dtype=np.uint64))


def _as_uint64(values: np.ndarray) -> UInt64s:
    if values.dtype.kind not in "iu":
        raise TypeError(f"mix64 hashes integers, not {values.dtype}")
    return np.atleast_1d(values.astype(np.int64) if values.dtype.kind == "i" else values).astype(np.uint64)


class _Epoch(NamedTuple):
    """One epoch's shuffled blocks."""

    blocks: Int64s  # (number of blocks,) block at each place
    ends: Int64s  # (number of windows,) position at which each window ends


class Order:
    """The order of ``sum(block_sizes)`` samples, epoch after epoch.

    ``window`` is the number of consecutive shuffled blocks within which samples are shuffled fully. Samples are
    numbered block by block in the order of ``block_sizes``.
    """

    def __init__(self, block_sizes: Sequence[int], seed: int, window: int = 8) -> None:
        self.sizes: Int64s = np.asarray(block_sizes, dtype=np.int64).reshape(-1)
        if (self.sizes < 0).any() or int(self.sizes.sum()) < 1:
            raise UserError("there is nothing to train on: the data source holds no samples")
        if window < 1:
            raise UserError(f"data.shuffle_window={window}: the shuffle window is a number of shards, 1 or more")
        self.seed, self.window = int(seed), int(window)
        self.starts: Int64s = np.cumsum(self.sizes) - self.sizes
        self._length = int(self.sizes.sum())
        self._epoch = lru_cache(2)(self._shuffled_blocks)
        self._window = lru_cache(4)(self._shuffled_samples)

    def __len__(self) -> int:
        return self._length

    def lookup(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Epochs and sample indices (int64, the shape of ``positions``) at stream positions q ≥ 0.

        Epoch q // N, place q % N. The stream runs on over the ends of epochs, so no last batch is ever dropped.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and int(positions.min()) < 0:
            raise ValueError(f"stream positions are 0 or more, got {int(positions.min())}")
        epochs, places = np.divmod(positions, self._length)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            ends = self._epoch(epoch).ends
            # side="right": windows of empty blocks have no places
            windows = np.searchsorted(ends, places[in_epoch], side="right")
            found = np.empty(windows.shape, dtype=np.int64)
            for number in np.unique(windows).tolist():
                inside = windows == number
                begin = int(ends[number - 1]) if number else 0
                found[inside] = self._window(epoch, number)[places[in_epoch][inside] - begin]
            indices[in_epoch] = found
        return epochs, indices

    def samples(self, positions: Int64s) -> tuple[Int64s, UInt64s]:
        """Sample indices at stream positions, and the random keys ``mix64(seed, epoch, index)`` of these samples."""
        epochs, indices = self.lookup(positions)
        # a batch seldom reaches over the end of an epoch, and one number is hashed faster than many
        epoch = int(epochs[0]) if len(epochs) and epochs[0] == epochs[-1] else epochs
        return indices, mix64(self.seed, epoch, indices)

    def coming(self, position: int) -> list[int]:
        """Blocks after the window of stream position ``position`` that should be on their way by then.

        A window's samples come from all of its blocks at once; so while it is used up the blocks of the next one are
        asked for, one after the other.
        """
        epoch, place = divmod(position, self._length)
        ends = self._epoch(epoch).ends
        number = int(np.searchsorted(ends, place, side="right"))
        begin = int(ends[number - 1]) if number else 0
        used = (place - begin) / max(int(ends[number]) - begin, 1)
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
        """Sample indices of one window in their shuffled order."""
        blocks = self._epoch(epoch).blocks[number * self.window : (number + 1) * self.window]
        samples = np.concatenate(
            [np.arange(self.starts[b], self.starts[b] + self.sizes[b], dtype=np.int64) for b in blocks]
        )
        return samples[np.argsort(mix64(self.seed, epoch, _SAMPLE_TAG, samples), kind="stable")]

    def __reduce__(self) -> tuple[type[Order], tuple[object, ...]]:
        return Order, (self.sizes, self.seed, self.window)  # caches are cheap to refill


def local_positions(
    start: int, global_batch: int, rank: int, world: int, micro: int = 0, micros: int = 1
) -> NDArray[np.int64]:
    """Stream positions (int64) of one rank's micro-batch in the global batch that begins at ``start``.

    They are the p in 0 .. global_batch - 1 with p ≡ micro·world + rank (mod world·micros), plus ``start``: over all
    ranks and micro-batches the whole global batch, whatever the world size.
    """
    if not (0 <= rank < world and 0 <= micro < micros):
        raise ValueError(f"no rank {rank} of {world}, or no micro-batch {micro} of {micros}")
    parts = world * micros
    if global_batch < 1 or global_batch % parts:
        low = global_batch // parts * parts
        fitting = " or ".join(str(size) for size in (low, low + parts) if size > 0)
        raise UserError(
            f"train.batch_size={global_batch} (the global batch) does not divide among {world} rank(s) × {micros} "
            f"micro-batch(es) = {parts}: use a multiple of {parts}, for example {fitting}"
        )
    return np.arange(micro * world + rank, global_batch, parts, dtype=np.int64) + int(start)


def mixing_figure(order: Order, epoch: int = 0) -> float:
    """How well one epoch is shuffled: how far apart samples come that lie side by side in a shard, as a part of N/3.

    1.0 is a uniform shuffle, 0 an unshuffled order; shuffling blocks alone changes next to nothing, and windows of w of
    W blocks give about w / W. O(N) time and memory.
    """
    n = len(order)
    _, indices = order.lookup(np.arange(n, dtype=np.int64) + n * epoch)
    places = np.empty(n, dtype=np.int64)
    places[indices] = np.arange(n)
    together = np.diff(np.repeat(np.arange(len(order.sizes)), order.sizes)) == 0
    if n < 3 or not together.any():
        return 1.0
    # two places of a uniform permutation are (N + 1) / 3 apart on average, and never less than 1
    return float((np.abs(np.diff(places))[together].mean() - 1) / ((n + 1) / 3 - 1))
