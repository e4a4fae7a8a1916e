"""What cannot be used stops the run, or is counted, listed and left out: never silence, never another order."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.data.core import workers
from mmtrain.data.core.loader import eval_batches, train_batches
from mmtrain.data.core.source import Fault, FaultLog
from mmtrain.data.images import shards as images
from mmtrain.data.images.shards import ImageShards
from mmtrain.errors import UserError
from mmtrain.parallel.ranks import Ranks
from mmtrain.train import evaluate

GREY: dict[str, Any] = {"image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}

Members = list[tuple[str, bytes]]


def shards(make_tar: Callable, samples: Callable, count: int = 3, each: int = 4) -> list[Path]:
    return [make_tar(samples(each, each * n), f"train/shard-{n:06d}.tar") for n in range(count)]


def damage(members: Members, name: str, content: bytes) -> Members:
    return [(member, content if member == name else old) for member, old in members]


def epoch(source: ImageShards, **options: Any) -> tuple[list[int], list[torch.Tensor], list[Fault]]:
    """Indices and images of one epoch in its order, and the faults that were told."""
    faults: list[Fault] = []
    order, images = [], []
    steps = len(source) // 4
    for batch in train_batches(source, seed=3, batch_size=4, start=0, steps=steps, on_fault=faults.append, **options):
        order += batch["index"].tolist()
        images += list(batch["image"])
    return order, images, faults


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_damaged_image_is_left_out_and_nothing_else_moves(
    make_tar: Callable, samples: Callable, image_bytes: Callable, kind: str, workers: int
) -> None:
    folder = shards(make_tar, samples)[0].parent
    plain = ImageShards(folder, train=True, augment="crop", skip=True, **GREY)
    order, images, faults = epoch(plain)
    assert not faults
    good = image_bytes(kind=kind, size=(40, 40))
    suffix = "jpg" if kind == "JPEG" else "png"
    members = [(name.replace("000005.png", f"000005.{suffix}"), old) for name, old in samples(4, 4)]
    make_tar(damage(members, f"000005.{suffix}", good[: len(good) // 2]), "train/shard-000001.tar")
    source = ImageShards(folder, train=True, augment="crop", skip=True, **GREY)
    order2, images2, faults = epoch(source, workers=workers)
    assert order2 == order
    assert [(fault.index, fault.samples) for fault in faults] == [(5, 1)]
    assert "shard-000001.tar, sample '000005'" in faults[0].where
    assert "cannot be decoded" in faults[0].reason
    for index, one, two in zip(order, images, images2, strict=True):
        assert torch.equal(one, two) == (index != 5)
    place = order.index(5)  # sample 6 stands in, with the randomness of sample 5
    alone = source.fetch(np.array([6]), source_key(5))["image"][0]
    assert torch.equal(images2[place], alone)


def source_key(index: int) -> np.ndarray:
    from mmtrain.data.core.order import mix64

    return mix64(3, 0, index)


def test_what_stands_in_does_not_depend_on_the_world(make_tar: Callable, samples: Callable) -> None:
    folder = make_tar(damage(samples(12), "000005.png", b"no image"), "train/shard-000000.tar").parent
    images: dict[int, torch.Tensor] = {}
    for world in (1, 2, 4):
        for rank in range(world):
            source = ImageShards(folder, train=True, augment="crop", skip=True, **GREY)
            for batch in train_batches(source, seed=1, batch_size=4, start=0, steps=3, rank=rank, world=world):
                for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                    assert torch.equal(images.setdefault(index, image), image)
    assert sorted(images) == list(range(12))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_leaves_faults_out_and_counts_the_others_once(
    make_tar: Callable, samples: Callable, world: int
) -> None:
    members = damage(damage(samples(11), "000004.png", b"no image"), "000005.png", b"")
    folder = make_tar(members, "val/shard-000000.tar").parent
    seen, faults = [], []
    for rank in range(world):
        source = ImageShards(folder, train=False, skip=True, **GREY)
        for batch in eval_batches(source, batch_size=2, rank=rank, world=world, on_fault=faults.append):
            assert len(batch["image"]) == len(batch["label"]) == len(batch["index"]) > 0
            assert "kept" not in batch
            seen += batch["index"].tolist()
            assert batch["label"].tolist() == [index % 3 for index in batch["index"].tolist()]
    assert sorted(seen) == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    assert sorted(fault.index for fault in faults) == [4, 5]


def test_a_truncated_tar(make_tar: Callable, samples: Callable) -> None:
    paths = shards(make_tar, samples)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[: len(content) // 2])
    folder = paths[0].parent
    with pytest.raises(UserError, match=r"shard-000001\.tar: the shard is truncated"):
        ImageShards(folder, train=True, **GREY)
    source = ImageShards(folder, train=True, skip=True, **GREY)
    assert source.block_sizes[0] == source.block_sizes[2] == 4
    assert 0 < source.block_sizes[1] < 4
    order, _, faults = epoch(source)
    assert len(faults) == 1
    assert faults[0].samples == 4 - source.block_sizes[1]
    assert "truncated" in faults[0].reason
    assert len(set(order)) == len(order)
    with pytest.raises(UserError, match="truncated"):  # what was left out once is not taken for whole
        ImageShards(folder, train=True, **GREY)


def test_a_name_that_points_outside_and_samples_that_lack_a_part(make_tar: Callable, samples: Callable) -> None:
    members = [*samples(4), ("../../x.png", b"1"), ("lonely.png", b"2"), ("lonelier.cls", b"1"), ("000009.cls", b"x")]
    folder = make_tar(members).parent
    with pytest.raises(UserError, match=r"'\.\./\.\./x\.png' has a path outside"):
        ImageShards(folder, train=True, **GREY)
    source = ImageShards(folder, train=True, skip=True, **GREY)
    assert len(source) == 4
    (fault,) = source.take_faults()
    for name in ("../../x.png", "lonely", "lonelier", "000009.cls"):
        assert name in fault.reason


def test_a_missing_shard(make_tar: Callable, samples: Callable) -> None:
    folder = shards(make_tar, samples)[0].parent
    (folder / "shard-000001.tar").unlink()
    pattern = f"{folder}/shard-{{000000..000002}}.tar"
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        ImageShards(pattern, train=True, **GREY)
    source = ImageShards(pattern, train=True, skip=True, **GREY)
    assert source.block_sizes == [4, 0, 4]
    order, _, faults = epoch(source)
    assert sorted(order) == list(range(8))
    assert [(fault.index, fault.samples) for fault in faults] == [(-1, 4)]
    assert "shard-000001.tar" in faults[0].where


def test_a_shard_that_changes_after_it_was_indexed(make_tar: Callable, samples: Callable) -> None:
    folder = shards(make_tar, samples)[0].parent
    stopping, skipping = (ImageShards(folder, train=True, augment="crop", skip=skip, **GREY) for skip in (False, True))
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes() + bytes(10240))
    with pytest.raises(UserError, match=r"shard-000001\.tar: the shard changed after the run started"):
        epoch(stopping)
    order, _, faults = epoch(skipping)
    assert sorted(order) == list(range(12))
    assert {fault.index for fault in faults} == {4, 5, 6, 7}  # told again by what they would stand in for
    assert all("changed" in fault.reason for fault in faults)


class Deadly:
    """Kills the worker that fetches sample 5, the first ``times`` times."""

    block_sizes = (12,)

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def __len__(self) -> int:
        return 12

    def fetch(self, indices: np.ndarray, keys: np.ndarray | None) -> dict[str, torch.Tensor]:
        marks = len(list(self.folder.iterdir()))
        if 5 in indices and marks < self.times:
            (self.folder / str(marks)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": torch.from_numpy(indices.copy())}


@pytest.mark.slow
def test_a_killed_worker_is_started_again_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"seed": 3, "batch_size": 2, "start": 0, "steps": 6, "workers": 1}
    expected = [batch["number"].tolist() for batch in train_batches(Deadly(tmp_path, 0), **options)]
    faults: list[Fault] = []
    deadly = Deadly(tmp_path, 1)
    assert [b["number"].tolist() for b in train_batches(deadly, on_fault=faults.append, **options)] == expected
    assert len(faults) == 1
    assert "died and was restarted" in faults[0].reason
    for mark in tmp_path.iterdir():
        mark.unlink()
    monkeypatch.setattr(workers, "_RESTARTS", 0)  # each takes DataLoader five seconds to see
    with pytest.raises(RuntimeError, match="a data worker died"):
        list(train_batches(Deadly(tmp_path, 99), on_fault=faults.append, **options))


def test_faults_are_limited_listed_once_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "faults/data_faults_rank_00000.jsonl"
    log = FaultLog(file, "train", 1000, 0.002)
    log.add(Fault(4, "a.tar, sample '4'", "no image"))
    log.add(Fault(4, "a.tar, sample '4'", "no image"))
    FaultLog(file, "val", 10, 0.5).add(Fault(1, "b.tar, sample '1'", "no image"))
    again = FaultLog(file, "train", 1000, 0.002)  # the next job of the run
    again.add(Fault(4, "a.tar, sample '4'", "no image"))
    other = FaultLog(file.with_name("data_faults_rank_00001.jsonl"), "train", 1000, 0.002)
    other.add(Fault(4, "a.tar, sample '4'", "no image"))  # of another epoch, on another rank
    assert again.missing() == other.missing() == (1, 1000)
    other.add(Fault(7, "a.tar, sample '7'", "no image"))
    assert again.missing() == (2, 1000)
    with pytest.raises(UserError, match=r"3 of 1000 samples of the train split.*sample '9'.*data\.max_faults=0\.002"):
        again.add(Fault(9, "a.tar, sample '9'", "no image"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["split"], line["index"]) for line in lines] == [("train", 4), ("val", 1), ("train", 9)]


def test_the_limit_is_one_for_all_ranks(tmp_path: Path) -> None:
    logs = [FaultLog(tmp_path / f"data_faults_rank_{rank:05d}.jsonl", "train", 1000, 0.002) for rank in range(3)]
    shard = Fault(-1, "c.tar", "gone")  # every rank sees it: it counts once
    for log in logs:
        log.add(shard)
    logs[0].add(Fault(4, "a.tar, sample '4'", "no image"))
    with pytest.raises(UserError, match="3 of 1001 samples of the train split"):
        logs[1].add(Fault(7, "a.tar, sample '7'", "no image"))


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "data_faults_rank_00000.jsonl"
    file.write_text('{"split": "train", "index": 1, "where": "a", "reason": "b", "samples": 1}\n{"split": "tra')
    FaultLog(file, "train", 100, 0.5).add(Fault(7, "a.tar, sample '7'", "no image"))
    assert FaultLog(file, "train", 100, 0.5).missing() == (2, 100)


def test_as_many_stand_ins_are_tried_as_the_message_says(
    make_tar: Callable, samples: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_STAND_INS", 3)
    members = samples(6)
    for bad in (1, 2, 3):
        members = damage(members, f"00000{bad}.png", b"no image")
    source = ImageShards(make_tar(members).parent, train=True, augment="crop", skip=True, **GREY)
    assert source.fetch(np.array([1]), source_key(1))["label"].tolist() == [4 % 3]
    source = ImageShards(
        make_tar(damage(members, "000004.png", b"x")).parent, train=True, augment="crop", skip=True, **GREY
    )
    with pytest.raises(UserError, match=r"sample '000001': this sample and the 3 samples after it are damaged"):
        source.fetch(np.array([1]), source_key(1))


def test_ranks_that_only_keep_step_are_given_a_sample_that_can_be_used(make_tar: Callable, samples: Callable) -> None:
    """With FSDP all ranks make as many forward passes; one on an empty batch would fail."""
    folder = make_tar(damage(samples(5), "000000.png", b"no image"), "val/shard-000000.tar").parent
    source = ImageShards(folder, train=False, skip=True, **GREY)
    config: Any = SimpleNamespace(eval=SimpleNamespace(batch_size=2), data=SimpleNamespace(workers=0))
    ranks = Ranks(3, 4, torch.device("cpu"))
    made = list(evaluate._batches(source, config, Ranks(0, 4, ranks.device), True, lambda fault: None))
    assert [(batch["index"].tolist(), counts) for batch, counts in made] == [([4], True)]
    source = ImageShards(
        make_tar(damage(samples(2), "000000.png", b"x"), "val/shard-000000.tar").parent, train=False, skip=True, **GREY
    )
    for rank in (0, 3):
        ((batch, counts),) = evaluate._batches(source, config, Ranks(rank, 4, ranks.device), True, lambda fault: None)
        assert not counts
        assert batch is not None
        assert len(batch["image"]) == 1


def test_batches_without_a_sample_count_when_a_worker_is_started_again() -> None:
    begun: list[int] = []

    def begin(done: int) -> Iterator[workers._Made]:
        begun.append(done)
        for number in range(done, 4):
            if number == 3 and len(begun) == 1:
                raise workers._WorkerDied("killed")
            samples = torch.arange(0 if number == 1 else 2) + 10 * number  # batch 1 has no usable sample
            yield workers._Made({"index": samples}, [])

    faults: list[Fault] = []
    made = [batch["index"].tolist() for batch in workers._survive(begin, faults.append)]
    assert made == [[0, 1], [20, 21], [30, 31]]
    assert begun == [0, 3]
    assert len(faults) == 1
