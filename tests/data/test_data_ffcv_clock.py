"""FFCV on the data clock: each sample once in an epoch for any world, the same bits for any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from beton_cases import LOOK, Made
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.images import ImageShards
from mmtrain.data.loader import eval_batches, train_batches
from mmtrain.data.order import Order, mix64
from mmtrain.data.source import Source, Streaming

WORLDS = (1, 2, 3, 4, 8)
LENGTH = 22

Image = torch.Tensor


def images_by_position(batches: Any) -> dict[int, tuple[int, Image]]:
    found = {}
    for batch in batches:
        for place, position in enumerate(batch["position"].tolist()):
            assert position not in found
            found[position] = int(batch["index"][place]), batch["image"][place]
    return found


@pytest.fixture(scope="module")
def expected(photos: Made) -> dict[int, tuple[int, Image]]:
    """The first epochs, from ``fetch``."""
    source = photos.source(augment="crop")
    order = Order(source.block_sizes, 3, 2)
    found = {}
    for position in range(5 * LENGTH):
        epochs, indices = order.lookup(np.array([position]))
        found[position] = int(indices[0]), source.fetch(indices, mix64(3, epochs, indices))["image"][0]
    return found


def test_a_beton_is_a_source_that_streams(photos: Made) -> None:
    source = photos.source(augment="crop")
    assert isinstance(source, Source)
    assert isinstance(source, Streaming)
    assert source.block_sizes == [6, 6, 5, 5]
    assert source.classes == ["ant", "bee", "cat"]


runs = st.lists(
    st.tuples(st.sampled_from(WORLDS), st.sampled_from((1, 3)), st.integers(1, 2), st.integers(1, 2)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=20, deadline=None)
@given(runs, st.sampled_from((1, 2)))
def test_stopping_anywhere_and_going_on_with_another_world(
    photos: Made, expected: dict[int, tuple[int, Image]], legs: list[tuple[int, int, int, int]], micros: int
) -> None:
    source, consumed = photos.source(augment="crop"), 0
    seen: dict[int, tuple[int, Image]] = {}
    for world, threads, per_rank, steps in legs:
        batch = world * micros * per_rank
        steps = min(steps, (5 * LENGTH - consumed) // batch)
        for rank in range(world):
            options: dict[str, Any] = {"rank": rank, "world": world, "micros": micros, "workers": threads}
            part = train_batches(source, seed=3, batch_size=batch, start=consumed, steps=steps, window=2, **options)
            seen |= images_by_position(part)
        consumed += steps * batch
        assert sorted(seen) == list(range(consumed))  # this step's global batch is the same set for every world
    for position, (index, image) in seen.items():
        assert index == expected[position][0]
        assert torch.equal(image, expected[position][1])
    for begin in range(0, consumed - LENGTH + 1, LENGTH):
        assert sorted(seen[p][0] for p in range(begin, begin + LENGTH)) == list(range(LENGTH))


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_epoch_is_bit_identical_for_every_way_to_read_it(
    photos: Made, expected: dict[int, tuple[int, Image]], threads: int, os_cache: bool
) -> None:
    source = photos.source(augment="crop", os_cache=os_cache)
    for world in WORLDS:
        found: dict[int, tuple[int, Image]] = {}
        steps = -(-2 * LENGTH // 24)
        for rank in range(world):
            part = train_batches(
                source, seed=3, batch_size=24, start=0, steps=steps, rank=rank, world=world, workers=threads, window=2
            )
            found |= images_by_position(part)
        assert sorted(found) == list(range(24 * steps))
        assert sorted(found[p][0] for p in range(LENGTH)) == list(range(LENGTH))
        assert all(
            torch.equal(image, expected[p][1]) and index == expected[p][0] for p, (index, image) in found.items()
        )


@pytest.mark.parametrize("augment", ["none", "light"])
def test_the_same_bits_at_the_same_step_as_from_the_shards(pixels: Made, augment: str) -> None:
    shards = ImageShards(pixels.shards / "train", train=True, augment=augment, **LOOK)
    options: dict[str, Any] = {"seed": 5, "batch_size": 12, "start": 24, "steps": 4, "rank": 1, "world": 2, "window": 2}
    ours = list(train_batches(pixels.source(augment=augment), workers=1, **options))
    theirs = list(train_batches(shards, **options))
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_takes_each_sample_once(photos: Made, world: int, batch: int) -> None:
    source, seen = photos.source("val", train=False), []
    images: dict[int, Image] = {}
    for rank in range(world):
        for part in eval_batches(source, batch_size=batch, rank=rank, world=world, workers=3 if rank % 2 else 1):
            assert 0 < len(part["index"]) <= batch
            assert part["label"].tolist() == source.labels[part["index"].numpy()].tolist()
            seen += part["index"].tolist()
            images |= dict(zip(part["index"].tolist(), part["image"], strict=True))
    assert sorted(seen) == list(range(7))
    whole = next(eval_batches(source, batch_size=7))["image"]
    assert all(torch.equal(image, whole[index]) for index, image in images.items())


def test_evaluation_in_windows_of_pages(photos: Made) -> None:
    source = photos.source("val", train=False, os_cache=False)
    parts = list(eval_batches(source, batch_size=2))
    assert [index for part in parts for index in part["index"].tolist()] == list(range(7))
    whole = next(eval_batches(photos.source("val", train=False), batch_size=7))["image"]
    assert torch.equal(torch.cat([part["image"] for part in parts]), whole)


def test_other_epochs_and_seeds_give_other_crops(photos: Made, expected: dict[int, tuple[int, Image]]) -> None:
    epochs: list[dict[int, Image]] = [
        {index: image for p, (index, image) in expected.items() if p // LENGTH == epoch} for epoch in range(2)
    ]
    same = [torch.equal(epochs[0][index], epochs[1][index]) for index in range(LENGTH)]
    assert sum(same) == 0
    other = images_by_position(
        train_batches(photos.source(augment="crop"), seed=4, batch_size=LENGTH, start=0, steps=1, window=2)
    )
    assert not any(torch.equal(image, epochs[0][index]) for index, image in other.values())


def test_randaugment_in_loader_processes_is_bit_identical(photos: Made) -> None:
    source = photos.source(augment="imagenet", re_prob=1.0)
    assert not isinstance(source, Streaming)
    options: dict[str, Any] = {"seed": 3, "batch_size": 8, "start": 16, "steps": 2, "window": 2}
    alone = list(train_batches(source, **options))
    apart = list(train_batches(source, workers=2, **options))
    assert len(alone) == len(apart) == 2
    for one, other in zip(alone, apart, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    ranks = [next(train_batches(source, rank=rank, world=2, **options)) for rank in range(2)]
    for rank, batch in enumerate(ranks):
        assert torch.equal(batch["image"], alone[0]["image"][rank::2])
