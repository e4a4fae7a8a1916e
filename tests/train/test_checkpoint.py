"""Checkpoints: whole or not there, verified, and never code."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mmtrain.errors import UserError
from mmtrain.parallel.ranks import Ranks
from mmtrain.train.checkpoint.store import CheckpointStore, load_state, verify
from mmtrain.train.checkpoint.tensor_files import read_tensors

ALONE = Ranks(0, 1, torch.device("cpu"))


def tensors(value: float, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((size,), float(value)), "b": torch.full((3,), float(value), dtype=torch.float64)}}


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Every write beyond ``size`` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    store.save(3, tensors(1.5), {"step": 3})
    newest = store.newest()
    assert newest == store.at(3)
    assert load_state(newest) == {"step": 3}
    target = tensors(0)
    read_tensors(newest, target, alone=True)
    assert torch.equal(target["model"]["w"], tensors(1.5)["model"]["w"])
    assert torch.equal(target["model"]["b"], tensors(1.5)["model"]["b"])


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "no manifest", "garbled manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    data, manifest = next(store.at(2).glob("*.distcp")), store.at(2) / "manifest.json"
    content = data.read_bytes()
    if fault == "truncated":
        data.write_bytes(content[:-1])
    elif fault == "flipped":
        data.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    elif fault == "missing":
        data.unlink()
    elif fault == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps([1, 2]))
    assert verify(store.at(2)) is not None
    assert store.newest() == store.at(1)
    assert "step_00000002 is not used" in caplog.text


def test_damaged_checkpoints_do_not_push_good_ones_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=2)
    for step in (1, 2):
        store.save(step, tensors(step), {})
    (store.at(2) / "manifest.json").unlink()
    store.save(3, tensors(3), {})
    assert store.at(1).exists()


def test_the_best_stays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=1)
    for step in (1, 2, 3):
        store.save(step, tensors(step), {}, best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("limit", [100, 5000])
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path, limit: int) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    store.save(1, tensors(1), {"step": 1})
    with files_at_most(limit), pytest.raises(UserError, match=r"step_00000002.*(?i:disk|large|write)"):
        store.save(2, tensors(2, size=100_000), {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert store.newest() == store.at(1)


def test_what_an_interrupted_save_left_is_removed_by_the_next_run_only(tmp_path: Path) -> None:
    torn = tmp_path / "step_00000009.partial"
    torn.mkdir()
    CheckpointStore(tmp_path, ALONE, clean=False)
    assert torn.exists()
    CheckpointStore(tmp_path, ALONE)
    assert not torn.exists()


def test_a_checkpoint_of_another_model_says_which_weights(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    store.save(1, tensors(1), {})
    other = {"model": {"w": torch.zeros(7), "c": torch.zeros(2)}}
    with pytest.raises(UserError, match=r"w has shape \(1000,\) instead of \(7,\); c is missing"):
        read_tensors(store.at(1), other, alone=True)
