"""The data clock: a permutation each epoch, random access, the same global batches for every world."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.core.order import Order, local_positions, mix64, mixing_figure
from mmtrain.errors import UserError

blocks = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
windows = st.integers(1, 14)
seeds = st.integers(-(2**63), 2**64 - 1)


def epoch(order: Order, number: int) -> np.ndarray:
    epochs, indices = order.lookup(np.arange(len(order)) + number * len(order))
    assert (epochs == number).all()
    return indices


def test_mix64_is_splitmix64() -> None:
    # Reference outputs of splitmix64 for seed 1234567: first and second.
    assert mix64(1234567).tolist() == [6457827717110365317]
    assert mix64(1234567 + 0x9E3779B97F4A7C15).tolist() == [3203168211198807973]
    assert mix64(0).tolist() == [0xE220A8397B1DCDAF]


def test_mix64_broadcasts_and_chains() -> None:
    table = mix64(5, np.arange(3)[:, None], np.arange(4, dtype=np.uint64))
    assert table.shape == (3, 4)
    assert table.dtype == np.uint64
    assert table[2, 3] == mix64(5, 2, 3)[0] == mix64(np.int32(5), np.int64(2), np.uint64(3))[0]
    assert mix64(-1)[0] == mix64(2**64 - 1)[0] == mix64(np.array([-1]))[0]
    assert len(np.unique(mix64(1, np.arange(100_000)))) == 100_000
    with pytest.raises(TypeError, match="integers"):
        mix64(np.array([0.5]))


def test_the_order_never_changes() -> None:
    # Pinned: a run that resumes with a later version must see the same samples.
    _, found = Order([3, 5, 2, 4], seed=7, window=2).lookup(np.arange(28))
    assert found[:14].tolist() == [8, 0, 2, 9, 1, 4, 11, 5, 13, 7, 6, 12, 3, 10]
    assert found[14:].tolist() == [10, 13, 0, 2, 1, 12, 11, 5, 9, 3, 7, 4, 8, 6]


@settings(deadline=None)
@given(blocks, windows, seeds, st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(sizes: list[int], window: int, seed: int, number: int) -> None:
    order = Order(sizes, seed, window)
    assert len(order) == sum(sizes)
    assert sorted(epoch(order, number)) == list(range(sum(sizes)))


@settings(deadline=None)
@given(blocks, windows, seeds)
def test_windows_hold_whole_blocks(sizes: list[int], window: int, seed: int) -> None:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    seen = owner[epoch(Order(sizes, seed, window), 0)]
    begin = 0
    while begin < len(seen):  # a window is the shortest run that begins at a border and holds whole blocks only
        end = begin + 1
        while sum(sizes[block] for block in set(seen[begin:end])) != end - begin:
            end += 1
        assert len(set(seen[begin:end])) <= window
        begin = end


@settings(deadline=None)
@given(blocks, windows, st.lists(st.integers(0, 2000), max_size=40))
def test_random_access_is_the_stream(sizes: list[int], window: int, positions: list[int]) -> None:
    whole = Order(sizes, 3, window).lookup(np.arange(2001))
    found = Order(sizes, 3, window).lookup(np.array(positions, dtype=np.int64))
    for got, expected in zip(found, whole, strict=True):
        assert got.tolist() == expected[positions].tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch(Order([50] * 20, seed), number)) for seed in range(4) for number in range(4)}
    assert len(orders) == 16
    assert not np.array_equal(
        np.sort(epoch(Order([50] * 20, 0), 0)[:400]), np.sort(epoch(Order([50] * 20, 0), 1)[:400])
    )


def test_what_is_coming_is_the_next_window_also_over_the_end_of_an_epoch() -> None:
    order = Order([10] * 6, seed=3, window=2)
    _, indices = order.lookup(np.arange(180))
    for last in range(19, 160, 20):  # the last position of each window
        coming = order.coming(last)
        assert sorted(coming) == sorted(set((indices[last + 1 : last + 21] // 10).tolist()))
        assert order.coming(last - 19) == coming[:1]
        assert order.coming(last - 10) == coming[:1]
        assert order.coming(last - 9) == coming


class Sorted(Order):
    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.divmod(positions, len(self))


def test_mixing_figure_tells_shuffled_from_sorted() -> None:
    assert mixing_figure(Order([100] * 100, 0, window=100)) == pytest.approx(1, abs=0.05)
    assert mixing_figure(Sorted([100] * 100, 0)) == 0
    assert mixing_figure(Order([2], 0)) == mixing_figure(Order([1, 0, 1, 1, 1], 0)) == 1


@pytest.mark.parametrize("window", [1, 4, 25])
def test_mixing_figure_is_the_part_of_the_data_in_a_window(window: int) -> None:
    # moving whole blocks about takes samples far from their places, and mixes nothing
    assert mixing_figure(Order([100] * 100, 0, window)) == pytest.approx(window / 100, rel=0.2)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**9))
def test_ranks_and_micro_batches_share_out_the_global_batch(world: int, micros: int, each: int, start: int) -> None:
    batch = world * micros * each
    parts = [local_positions(start, batch, r, world, m, micros) for m in range(micros) for r in range(world)]
    assert {len(part) for part in parts} == {each}
    assert sorted(np.concatenate(parts)) == list(range(start, start + batch))
    for place, part in enumerate(parts):  # place = micro·world + rank
        assert set((part - start) % (world * micros)) == {place}


def test_a_batch_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=10: .*multiple of 4, for example 8 or 12"):
        local_positions(0, 10, 0, 2, 0, 2)
    with pytest.raises(UserError, match=r"for example 8$"):
        local_positions(0, 3, 0, 8)


def test_bad_orders_are_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        Order([0, 0], 0)
    with pytest.raises(UserError, match=r"data\.shuffle_window=0"):
        Order([1], 0, window=0)
    with pytest.raises(ValueError, match="0 or more"):
        Order([1], 0).lookup(np.array([-1]))


def test_seeking_into_imagenet_is_fast() -> None:
    begin = time.thread_time()
    order = Order([1000] * 1281, seed=1)
    order.lookup(np.arange(700_000, 701_024))
    assert time.thread_time() - begin < 1.0


def test_a_pickle_carries_no_caches() -> None:
    order = Order([1000] * 50, 3)
    expected = epoch(order, 0)
    assert len(pickle.dumps(order)) < 5000
    assert np.array_equal(epoch(pickle.loads(pickle.dumps(order)), 0), expected)
