"""What the data clock promises, stated once for every source: on any ranks and workers, stopped and gone on anywhere.

The yardstick is ``Source.fetch`` of one sample at a time: which sample stands at a position, and what is in it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beton_cases import LOOK, Made, make_shards, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.core.loader import eval_batches, train_batches
from mmtrain.data.core.order import Order, mix64
from mmtrain.data.core.source import Source
from mmtrain.data.images.cache import ShardCache
from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.data.series import windows
from mmtrain.data.series.table_source import SeriesWindows
from tests.data.panels import in_shards, opened

WORLDS = (1, 2, 3, 4, 8)
#: Ranks and micro-batches: all of them divide a global batch of 24.
PARTS = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 3), (2, 3), (3, 2), (4, 2)]
#: Sources that make something else of a sample in each epoch.
AUGMENTED = ("crop", "light", "imagenet", "far", "beton", "beton-processes", "beton-pages")
SLOW = pytest.param("beton-pages", marks=pytest.mark.slow)  # its code takes long to compile
Batch = dict[str, Any]
Sample = tuple[int, str]  # its index, and a digest of what is in it


@dataclass
class Kind:
    """Sources of one kind: to train on, of different sizes and blocks, and to evaluate."""

    name: str
    train: list[Source]
    held_out: list[Source]
    known: dict[tuple[int, ...], Sample] = field(default_factory=dict, repr=False)

    def expected(self, number: int, seed: int, window: int, position: int) -> Sample:
        """What stands at a position of the stream of ``train[number]``, fetched alone."""
        key = number, seed, window, position
        if key not in self.known:
            source = self.train[number]
            epochs, indices = Order(source.block_sizes, seed, window).lookup(np.array([position]))
            self.known[key] = next(samples(indices, source.fetch(indices, mix64(seed, epochs, indices))))
        return self.known[key]


def samples(indices: Any, batch: Batch) -> Iterator[Sample]:
    names = [name for name in batch if name not in ("position", "index", "key")]
    for place, index in enumerate(indices.tolist()):
        content = [(name, batch[name][place].contiguous().numpy().tobytes()) for name in sorted(names)]
        yield index, hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 images in shards of 6, 6, 5 and 5, and 7 to evaluate."""
    files = [picture(n, (40 + 3 * n % 17, 30 + 5 * n % 23)) for n in range(29)]
    return make_shards(tmp_path_factory.mktemp("every") / "set", {"train": files[:22], "val": files[22:]}, 6)


def of_shards(root: Path, augment: str, cache: ShardCache | None = None) -> Kind:
    files: list[Any] = sorted((root / "train").glob("*.tar"))
    if cache is not None:
        files = [file.as_uri() for file in files]
    sources = [
        ImageShards(some, train=True, augment=augment, cache=cache, **LOOK) for some in (files, files[1:3], files[:1])
    ]
    return Kind(augment, [*sources], [ImageShards(root / "val", train=False, **LOOK)])


def of_panel(folder: Path) -> Kind:
    patch = pytest.MonkeyPatch()
    patch.setattr(windows, "BLOCK", 20)
    try:
        data = in_shards(folder, [61, 5, 33, 17, 48, 20, 19, 40], 64, known=["price"], static=["size"], calendar=True)
        small = opened(folder / "panel", lookback=30, horizon=4)
    finally:
        patch.undo()
    assert len(data.train.block_sizes) > 2
    assert len(data.panel.values) > 2
    return Kind("panel", [data.train, small.train], [data.val, data.test])


def of_tables() -> Kind:
    values = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    made = [SeriesWindows(values, 3, stop, 6, 3, stride) for stop in (88, 12, 35, 62) for stride in (1, 4)]
    return Kind("table", [*made], [*made])


@pytest.fixture(scope="module", params=[*AUGMENTED[:-1], SLOW, "table", "panel", "synthetic"])
def kind(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    name = request.param
    if name == "far":
        pytest.importorskip("fsspec", reason="far shards need fsspec: pip install 'mmtrain[remote]'")
        return of_shards(shards, "crop", ShardCache(tmp_path_factory.mktemp("cache"), 1 << 30))
    if name.startswith("beton"):
        photos: Made = request.getfixturevalue("photos")
        augment = "imagenet" if name == "beton-processes" else "crop"
        source = photos.source(augment=augment, os_cache=name != "beton-pages")
        return Kind(name, [source], [photos.source("val", train=False, os_cache=name != "beton-pages")])
    if name == "table":
        return of_tables()
    if name == "panel":
        return of_panel(tmp_path_factory.mktemp("panel"))
    if name == "synthetic":
        made = [SyntheticImages(3, 8, length, seed=0) for length in (31, *range(1, 27))]
        return Kind(name, [*made], [*made])
    return of_shards(shards, name)


def steps_of(source: Source, world: int, micros: int, steps: int, **options: Any) -> list[dict[int, Sample]]:
    """Of each step the samples of the global batch, by position."""
    made: list[dict[int, Sample]] = [{} for _ in range(steps)]
    for rank in range(world):
        stream = train_batches(source, steps=steps, rank=rank, world=world, micros=micros, **options)
        for number, batch in enumerate(stream):
            step = made[number // micros]
            for position, sample in zip(batch["position"].tolist(), samples(batch["index"], batch), strict=True):
                assert position not in step
                step[position] = sample
        assert number + 1 == steps * micros
    return made


def check_legs(kind: Kind, number: int, size: int, legs: list[tuple[int, int, int, int]], seed: int, wide: int) -> None:
    """Runs of (world, micro-batches, workers, steps), one after the other, and a last one to the end of the epoch."""
    source, consumed, seen = kind.train[number], 0, list[int]()
    for world, micros, workers, most in [*legs, (1, 1, 0, 10**6)]:
        steps = min(most, -(-max(len(source) - consumed, 0) // size))
        if not steps:
            break
        options: dict[str, Any] = {"seed": seed, "batch_size": size, "window": wide, "workers": workers}
        for step in steps_of(source, world, micros, steps, start=consumed, **options):
            assert sorted(step) == list(range(consumed, consumed + size))
            for position, sample in step.items():
                assert sample == kind.expected(number, seed, wide, position)
            seen += [step[position][0] for position in sorted(step)]
            consumed += size
    assert Counter(seen[: len(source)]) == Counter(range(len(source)))


@settings(max_examples=12, deadline=None)
@given(
    number=st.integers(0, 26),
    each=st.integers(1, 2),
    legs=st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 2)), max_size=4),
    seed=st.integers(0, 1),
    wide=st.integers(1, 3),
)
def test_an_epoch_is_every_sample_once_wherever_it_stops(
    kind: Kind, number: int, each: int, legs: list[tuple[tuple[int, int], int]], seed: int, wide: int
) -> None:
    """Each step is the same samples in the same bits for every world, and a run may stop after any of them."""
    runs = [(world, micros, 0, steps) for (world, micros), steps in legs]
    check_legs(kind, number % len(kind.train), 24 * each, runs, seed, wide)


def test_small_batches_cross_the_end_of_the_epoch(kind: Kind) -> None:
    """Two epochs in global batches that do not divide them."""
    source, size = kind.train[0], 5
    steps = -(-2 * len(source) // size)
    made = steps_of(source, 1, 1, steps, start=0, seed=2, batch_size=size, window=2)
    stream = {position: sample for step in made for position, sample in step.items()}
    assert sorted(stream) == list(range(steps * size))
    epochs = [[stream[len(source) * epoch + place] for place in range(len(source))] for epoch in range(2)]
    assert all(sorted(index for index, _ in epoch) == list(range(len(source))) for epoch in epochs)
    again = steps_of(source, 1, 1, steps, start=0, seed=2, batch_size=size, window=2)
    assert again == made  # one seed: the same, to the bit
    assert [index for index, _ in epochs[0]] != [index for index, _ in epochs[1]]
    other = steps_of(source, 1, 1, steps, start=0, seed=3, batch_size=size, window=2)
    assert [sample[0] for step in other for sample in step.values()] != [
        index for step in made for index, _ in step.values()
    ]
    same = [content == dict(epochs[1])[index] for index, content in epochs[0]]
    assert not any(same) if kind.name in AUGMENTED else all(same)


@settings(max_examples=12, deadline=None)
@given(number=st.integers(0, 26), world=st.sampled_from(WORLDS), size=st.integers(1, 30))
@pytest.mark.slow
def test_evaluation_is_every_sample_once(kind: Kind, number: int, world: int, size: int) -> None:
    check_evaluation(kind.held_out[number % len(kind.held_out)], world, size, 0)


def check_evaluation(source: Source, world: int, size: int, workers: int) -> None:
    whole = list(samples(np.arange(len(source)), source.fetch(np.arange(len(source)), None)))
    for rank in range(world):
        seen: list[Sample] = []
        for batch in eval_batches(source, batch_size=size, rank=rank, world=world, workers=workers):
            assert 0 < len(batch["index"]) <= size
            seen += samples(batch["index"], batch)
        assert seen == whole[rank::world]


@pytest.mark.slow
def test_workers_change_nothing(kind: Kind) -> None:
    check_legs(kind, 0, 12, [(2, 1, 1, 1), (1, 2, 3, 1)], 1, 2)
    check_evaluation(kind.held_out[0], 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "worlds"), [(1, (1, 3, 8)), (3, (2, 4))])
def test_each_step_is_the_same_for_any_ranks_and_workers(kind: Kind, workers: int, worlds: tuple[int, ...]) -> None:
    steps = -(-len(kind.train[0]) // 24)
    for world in worlds:
        made = steps_of(kind.train[0], world, 1, steps, start=0, seed=0, batch_size=24, window=1, workers=workers)
        for step, found in enumerate(made):
            assert found == {p: kind.expected(0, 0, 1, p) for p in range(24 * step, 24 * (step + 1))}
        check_evaluation(kind.held_out[0], world, 2, workers)
