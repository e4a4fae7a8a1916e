"""Checkpoints that break, disks that fill up, ranks that fail in a save: on two ranks, and in the thread that saves."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compare import last_checkpoint, same_end
from faults import Kill, NoManifest, NoStaging, SmallFiles
from ranks_apart import Ended, Fault, run_ranks

from mmtrain.train.checkpoint.store import verify

OPTIONS = ("train.max_steps=12", "eval.every_steps=6", "checkpoint.every_steps=2", "train.ema_decay=0.9")
#: The disk of these tests, in KiB: three checkpoints fit and the fourth does not.
SIZE = 640


@pytest.fixture(scope="module")
def whole(waves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without a fault, and all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run_ranks(write_config(folder, waves), folder / "run", *OPTIONS, "checkpoint.keep=100")
    assert [rank.status for rank in ended] == [0, 0], ended
    return folder / "run"


@pytest.fixture
def config(waves: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, waves)


def write_config(folder: Path, waves: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(f"""
model: {{name: tsm2, lookback: 48, horizon: 24, dim: 8, depth: 1, dropout: 0.2}}
data: {{kind: series, path: {waves}, split: ratio}}
task: {{kind: forecasting}}
train: {{epochs: 4, batch_size: 32, log_every: 2}}
threads: 1
""")
    return path


def statuses(ended: list[Ended]) -> list[int | None]:
    return [rank.status for rank in ended]


def _truncate(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:-20])


def _flip(data: Path) -> None:
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 8
    data.write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm",
    [_truncate, _flip, Path.unlink, lambda data: (data.parent / "manifest.json").unlink()],
    ids=["truncated", "flipped", "missing", "no manifest"],
)
def test_past_a_damaged_checkpoint_to_the_same_end(
    config: Path, whole: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    """The file of rank 1 is harmed: the one before is used, and the damaged one is written anew."""
    broken = tmp_path / "run"
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    for path in (broken / "checkpoints").iterdir():
        if path.name > "step_00000008":
            shutil.rmtree(path)
    newest = broken / "checkpoints" / "step_00000008"
    harm(next(newest.glob("__1_*")))
    ended = run_ranks(config, broken, *OPTIONS, "checkpoint.keep=100")
    assert statuses(ended) == [0, 0], ended
    assert f"{newest} is not used: " in ended[0].said
    assert "resuming at step 6" in ended[0].said
    assert same_end(whole, broken)
    assert verify(newest) is None


@pytest.mark.slow
def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_is_tested(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    state = last_checkpoint(broken) / "state.json"
    assert '"best_step": 12' in state.read_text()
    # as if an earlier one had been the best; its manifest is made to fit
    shutil.rmtree(broken / "checkpoints" / "step_00000006")
    _claim(last_checkpoint(broken), '"best_step": 12', '"best_step": 6')
    ended = run_ranks(config, broken, *OPTIONS)
    assert statuses(ended) == [0, 0], ended
    assert "step_00000006: the best checkpoint is damaged or missing. The newest is tested" in ended[0].said


def _claim(checkpoint: Path, was: str, now: str) -> None:
    from mmtrain.train.checkpoint.store import entries_of, write_manifest

    state = checkpoint / "state.json"
    state.write_text(state.read_text().replace(was, now))
    write_manifest(checkpoint, entries_of(p for p in checkpoint.iterdir() if p.name != "manifest.json"))


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, ``SIZE`` KiB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _as_root("mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _as_root(*command: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_ends_both_ranks_and_a_larger_one_lets_them_go_on(
    config: Path, whole: Path, disk: Path, asynchronous: str
) -> None:
    options = (*OPTIONS, "checkpoint.keep=100", f"checkpoint.asynchronous={asynchronous}")
    ended = run_ranks(config, disk / "run", *options)
    assert statuses(ended) == [2, 2], ended
    assert "No space left on device" in ended[0].said or "the disk may be full" in ended[0].said
    assert "continues from" in ended[0].said
    assert "Traceback" not in ended[0].said + ended[1].said
    assert verify(last_checkpoint(disk / "run")) is None
    _as_root("mount", "-o", "remount,size=64m", str(disk))
    ended = run_ranks(config, disk / "run", *options)
    assert statuses(ended) == [0, 0], ended
    assert "resuming at step" in ended[0].said
    assert same_end(whole, disk / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [SmallFiles(on=1, step=4), SmallFiles(on=0, step=4), NoManifest()], ids=["rank 1", "rank 0", "manifest"]
)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_fails_on_one_rank_ends_both(
    config: Path, whole: Path, tmp_path: Path, asynchronous: str, fault: Fault
) -> None:
    options = (*OPTIONS, f"checkpoint.asynchronous={asynchronous}")
    ended = run_ranks(config, tmp_path / "run", *options, fault=fault)
    assert statuses(ended) == [2, 2], ended
    assert "the checkpoint could not be written" in ended[0].said
    assert ended[1].said.count("could not be written") == 0  # rank 0 says it for both
    if not isinstance(fault, NoManifest):
        assert verify(last_checkpoint(tmp_path / "run")) is None
        assert last_checkpoint(tmp_path / "run").name == "step_00000002"


@pytest.mark.slow
def test_a_rank_that_cannot_copy_its_state_leaves_nobody_waiting(config: Path, tmp_path: Path) -> None:
    ended = run_ranks(config, tmp_path / "run", *OPTIONS, fault=NoStaging(on=1))
    assert ended[1].status == 1
    assert "MemoryError: no room for a copy" in ended[1].said
    assert ended[0].status not in (0, None)  # it ended by itself, within the grace


@pytest.mark.slow
def test_a_folder_that_became_read_only(config: Path, disk: Path) -> None:
    _as_root("mount", "-o", "remount,size=64m", str(disk))
    ended = run_ranks(config, disk / "run", *OPTIONS, fault=Kill(0, step=5))
    assert ended[0].status == -9
    _as_root("mount", "-o", "remount,ro", str(disk))
    ended = run_ranks(config, disk / "run", *OPTIONS)
    assert statuses(ended) == [2, 2], ended
    assert "the run folder cannot be written (Read-only file system)" in ended[0].said
    assert ended[1].said == ""


@pytest.mark.slow
def test_a_file_where_the_checkpoints_should_be(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    ended = run_ranks(config, tmp_path / "run", *OPTIONS)
    assert statuses(ended) == [2, 2], ended
    assert "cannot write checkpoints there" in ended[0].said
