"""Which checkpoints stay, in which order things are written and deleted, and what a save is a snapshot of."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

import mmtrain.train.checkpoint.store as checkpoint
from mmtrain.errors import UserError
from mmtrain.parallel.ranks import Ranks
from mmtrain.train.checkpoint.store import CheckpointStore, load_state, verify
from mmtrain.train.checkpoint.tensor_files import read_tensors

ALONE = Ranks(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((64,), float(value))}}


def save_and_wait(store: CheckpointStore, step: int) -> None:
    store.save(step, tensors(step), {})
    store.wait()


def steps(folder: Path) -> list[str]:
    return sorted(p.name.removeprefix("step_").lstrip("0") for p in folder.iterdir())


def test_the_newest_the_best_and_every_tenth_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=2, keep_every=10)
    for step in range(2, 26, 2):
        store.save(step, tensors(step), {}, best=6)
    assert steps(tmp_path) == ["10", "20", "22", "24", "6"]


def test_a_damaged_checkpoint_is_not_one_of_those_that_stay(tmp_path: Path) -> None:
    """Found at the start, it keeps its manifest: still no good one is deleted in its stead."""
    store = CheckpointStore(tmp_path, ALONE, keep=2)
    for step in (3, 6, 7):
        store.save(step, tensors(step), {})
    data = next(store.at(7).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    again = CheckpointStore(tmp_path, ALONE, keep=2)
    assert again.newest() == again.at(6)
    again.save(9, tensors(9), {})
    assert again.at(6).exists()
    assert again.at(9).exists()


def test_partial_folders_never_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=2)
    store.save(1, tensors(1), {})
    for name in ("step_00000008.partial", "step_00000009.old.partial"):
        shutil.copytree(store.at(1), tmp_path / name)
    store.save(2, tensors(2), {})
    store.save(3, tensors(3), {})
    assert store.newest() == store.at(3)
    assert store.at(2).exists()


def test_a_step_whose_checkpoint_is_torn_is_saved_anew(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    for step in (1, 2):
        store.save(step, tensors(step), {})
    (store.at(2) / "manifest.json").unlink()
    again = CheckpointStore(tmp_path, ALONE)
    assert again.newest() == again.at(1)
    again.save(2, tensors(2), {"whole": True})
    assert verify(again.at(2)) is None
    assert load_state(again.at(2)) == {"whole": True}


@pytest.mark.parametrize("moment", ["rename", "write_manifest", "sync"])
def test_a_kill_between_write_and_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=1)
    store.save(1, tensors(1), {})

    def kill(*_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if moment == "rename" else checkpoint, moment, kill)
        with pytest.raises(Killed):
            store.save(2, tensors(2), {})
    again = CheckpointStore(tmp_path, ALONE, keep=1)
    assert again.newest() == again.at(1)
    assert steps(tmp_path) == ["1"]
    again.save(2, tensors(2), {})
    assert steps(tmp_path) == ["2"]


def test_nothing_is_deleted_before_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=1)
    store.save(1, tensors(1), {})
    sound, seen = checkpoint.sync, []

    def sync(path: Path) -> None:
        sound(path)
        seen.append(path.name)

    def remove(path: Path, **_: object) -> None:
        if path.exists():
            seen.append(f"delete {path.name}")

    monkeypatch.setattr(checkpoint, "sync", sync)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    store.save(2, tensors(2), {})
    # the folder itself last: the rename is on the disk
    files = ["state.json", "config.yaml", "manifest.json", "step_00000002.partial"]
    assert seen == [*files, tmp_path.name, "delete step_00000001.old.partial"]


def test_a_kill_while_an_old_one_is_deleted_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=1)
    store.save(1, tensors(1), {})

    def kill(path: Path, **_: object) -> None:
        if path.exists():
            next(path.glob("*.distcp")).unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            store.save(2, tensors(2), {})
    again = CheckpointStore(tmp_path, ALONE, keep=1)
    assert steps(tmp_path) == ["2"]
    assert again.newest() == again.at(2)


def test_one_that_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, ALONE, keep=1)
    store.save(1, tensors(1), {})

    def refuse(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(store, "_drop", refuse)
    store.save(2, tensors(2), {})
    assert store.newest() == store.at(2)
    assert "step_00000001: the old checkpoint could not be deleted: Device or resource busy" in caplog.text


def test_an_asynchronous_save_is_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights changed in place after ``save`` returned, and before a byte was written, are not in the file."""
    go, sound = threading.Event(), checkpoint.write_tensors

    def late(*arguments: object) -> None:
        assert go.wait(30)
        sound(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", late)
    store = CheckpointStore(tmp_path, ALONE, asynchronous=True, config="name: x\n")
    # a view, a part of a larger tensor, and a tensor of no dimension
    base = torch.arange(12.0).reshape(3, 4)
    parts = {"model": {"view": base.t(), "part": base[1], "scalar": torch.tensor(1.0), "own": torch.ones(5)}}
    kept = {name: tensor.clone() for name, tensor in parts["model"].items()}
    state = {"step": 1}
    store.save(1, parts, state)
    for tensor in parts["model"].values():
        tensor.add_(100)
    state["step"] = 2
    assert not store.at(1).exists()
    go.set()
    store.wait()
    found = {"model": {name: torch.zeros_like(tensor) for name, tensor in kept.items()}}
    read_tensors(store.at(1), found, alone=True)
    for name in kept:
        assert torch.equal(found["model"][name], kept[name]), name
    assert load_state(store.at(1)) == {"step": 1}
    assert (store.at(1) / "config.yaml").read_text() == "name: x\n"
    store.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_fails_in_the_thread_is_said_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path, ALONE, asynchronous=asynchronous)
    store.save(1, tensors(1), {})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", full)
        with pytest.raises(UserError, match=r"step_00000002: .*No space left on device.*continues from it"):
            save_and_wait(store, 2)
    assert steps(tmp_path) == ["1"]
    store.save(3, tensors(3), {})
    store.close()
    assert store.newest() == store.at(3)


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints there \(File exists\)\. Choose another"):
        CheckpointStore(tmp_path / "checkpoints", ALONE)
