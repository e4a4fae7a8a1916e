"""Loaders: identical batches for any number of workers, exact resume at any world, faults that surface."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.data.core.loader import eval_batches, train_batches
from mmtrain.data.core.order import mix64
from mmtrain.data.core.source import Source
from mmtrain.data.images.shards import ImageShards
from mmtrain.errors import UserError


class Numbers:
    """Source whose samples are their own numbers; ``at`` does something when one sample is fetched."""

    def __init__(self, sizes: list[int], trap: int = -1, act: Any = None) -> None:
        self.block_sizes, self.trap, self.act = sizes, trap, act

    def __len__(self) -> int:
        return sum(self.block_sizes)

    def fetch(self, indices: np.ndarray, keys: np.ndarray | None) -> dict[str, torch.Tensor]:
        if self.trap in indices:
            self.act()
        return {"number": torch.from_numpy(indices.copy())}


def test_numbers_is_a_source() -> None:
    assert isinstance(Numbers([1]), Source)


def test_micro_batches_come_in_order_with_their_position_index_and_key() -> None:
    batches = list(train_batches(Numbers([7, 6]), seed=5, batch_size=12, start=24, steps=2, rank=1, world=2, micros=3))
    assert len(batches) == 6
    assert [batch["position"].tolist() for batch in batches[:3]] == [[25, 31], [27, 33], [29, 35]]
    assert batches[3]["position"].tolist() == [37, 43]
    for batch in batches:
        epochs = batch["position"].numpy() // 13
        assert batch["key"].numpy().view(np.uint64).tolist() == mix64(5, epochs, batch["index"].numpy()).tolist()
        assert batch["number"].tolist() == batch["index"].tolist()


@pytest.mark.parametrize("augment", ["light", "crop"])
def test_batches_stay_as_they_are_though_their_memory_is_used_again(digits: Path, augment: str) -> None:
    source = ImageShards(digits / "train", image_size=32, train=True, augment=augment, mean=[0.3] * 3, std=[0.3] * 3)
    options: dict[str, Any] = {"seed": 2, "batch_size": 24, "start": 0, "steps": 12}  # more than there are slots
    held = list(train_batches(source, workers=1, prefetch=1, **options))
    for one, two in zip(held, train_batches(source, workers=0, **options), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_states_are_left_alone(digits: Path, workers: int) -> None:
    source = ImageShards(digits / "val", image_size=32, train=True, augment="imagenet", mean=[0.5] * 3, std=[0.5] * 3)

    def draw() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    for _ in train_batches(source, seed=0, batch_size=8, start=0, steps=2, workers=workers):
        pass
    for _ in eval_batches(Numbers([5]), batch_size=2, workers=workers):
        pass
    assert draw() == expected


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _user_error() -> None:
    raise UserError("shard-7.tar: broken; copy it again")


def _bug() -> None:
    raise KeyError("a bug in a source")


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)worker died .*memory.*data\.workers"):
        list(eval_batches(Numbers([40], trap=21, act=_kill), batch_size=2, workers=2))
    assert time.monotonic() - begin < 20
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_come_out_as_they_are(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        list(eval_batches(Numbers([9], trap=5, act=_user_error), batch_size=2, workers=workers))
    assert str(caught.value) == "shard-7.tar: broken; copy it again"


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_in_a_source_keep_their_type(workers: int) -> None:
    with pytest.raises(KeyError, match="a bug in a source"):
        list(eval_batches(Numbers([9], trap=5, act=_bug), batch_size=2, workers=workers))


def test_workers_ignore_the_signals_of_the_run() -> None:
    batches = eval_batches(Numbers([400]), batch_size=2, workers=2)
    first = next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(child.pid or 0, number)
    seen = first["number"].tolist() + [n for part in batches for n in part["number"].tolist()]
    assert seen == list(range(400))


def test_leaving_early_stops_the_workers() -> None:
    batches = train_batches(Numbers([100]), seed=0, batch_size=4, start=0, steps=1000, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert not multiprocessing.active_children()


def test_exit_in_the_middle_of_a_run_does_not_wait_for_workers() -> None:
    code = (
        "import sys; from mmtrain.data.core.loader import eval_batches\n"
        "from mmtrain.data.images.synthetic import SyntheticImages\n"
        "batches = eval_batches(SyntheticImages(2, 8, 500, seed=0), batch_size=2, workers=2)\n"
        "next(batches); sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_one_sample(workers: int) -> None:
    batches = eval_batches(Numbers([3]), batch_size=1, workers=workers)
    assert [batch["number"].tolist() for batch in batches] == [[0], [1], [2]]


def test_bad_options_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=7"):
        train_batches(Numbers([9]), seed=0, batch_size=7, start=0, steps=1, world=2)
    with pytest.raises(UserError, match=r"data\.workers=-1"):
        train_batches(Numbers([9]), seed=0, batch_size=4, start=0, steps=1, workers=-1)
    with pytest.raises(UserError, match="batch size"):
        eval_batches(Numbers([9]), batch_size=0)
