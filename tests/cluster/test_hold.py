"""Who may train in a run folder: the lock, the holder's file, and which holders count as gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmtrain.cluster.task import run_training
from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.runs import hold, journal, slurm
from mmtrain.runs.hold import Holder, hold_folder, live_holder

ELSEWHERE = Holder("node7", "another machine", 123, 1.0, None, 0, "t")

_HOLDS = """
import sys, time
from pathlib import Path
from mmtrain.runs.hold import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "STALE", 600)  # a test that waits for it where it should not never ends
    monkeypatch.setattr(hold, "_CHECK_EVERY", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def _left(run: Path, holder: Holder, age: float = 0.0) -> None:
    """What ``holder`` has left in ``run``, with its last beat ``age`` seconds ago."""
    (run / hold.NAME).write_text(json.dumps(asdict(holder)))
    os.utime(run / hold.NAME, (time.time() - age,) * 2)


def _take(run: Path) -> float:
    """Take the folder, and see that nothing is left of it; how long that took, in seconds."""
    begin = time.monotonic()
    with hold_folder(run):
        taken = time.monotonic() - begin
        found = Holder.of(run)
        assert found is not None
        assert found.pid == os.getpid()
    assert not (run / hold.NAME).exists()
    return taken


def test_a_second_start_is_refused_and_told_who_holds_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"process {other.pid} on .* is training in this folder.*mmtrain runs stop"):
        _take(tmp_path)
    assert live_holder(tmp_path) == Holder.of(tmp_path)
    (tmp_path / hold.NAME).unlink()
    with pytest.raises(UserError, match="another process is training in this folder"):
        _take(tmp_path)  # the lock alone tells


def test_the_folder_of_a_killed_process_is_free_at_once(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / hold.NAME).exists()
    assert live_holder(tmp_path) is None
    _take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_file_locks_the_holders_file_tells(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise UserError("no locks here")

    monkeypatch.setattr(hold, "exclusive", no_locks)
    with pytest.raises(UserError, match=f"process {other.pid} "):
        _take(tmp_path)
    other.kill()
    other.wait()
    _take(tmp_path)


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    _left(tmp_path, replace(Holder.here(), began=1.0))
    _take(tmp_path)


def test_where_nobody_can_be_asked_the_beat_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _left(tmp_path, ELSEWHERE)
    assert live_holder(tmp_path) == ELSEWHERE
    monkeypatch.setattr(hold, "STALE", 0.6)
    assert _take(tmp_path) > 0.3
    _left(tmp_path, ELSEWHERE, age=10)
    assert live_holder(tmp_path) is None
    _take(tmp_path)
    monkeypatch.setattr(hold, "STALE", 600)
    _left(tmp_path, ELSEWHERE)
    beat = threading.Timer(0.2, os.utime, args=(tmp_path / hold.NAME,))
    beat.start()
    with pytest.raises(UserError, match="process 123 on node7 is training"):
        _take(tmp_path)
    beat.join()


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED"])
def test_a_job_that_runs_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(slurm, "query_states", lambda jobs: {"7": state})
    _left(tmp_path, replace(ELSEWHERE, job="7"), age=1000)
    with pytest.raises(UserError, match="process 123 of Slurm job 7 on node7 is training"):
        _take(tmp_path)


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL", "TIMEOUT", "COMPLETED", "PENDING", "REQUEUED"])
def test_a_job_that_does_not_run_has_left_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(slurm, "query_states", lambda jobs: {"7": state})
    _left(tmp_path, replace(ELSEWHERE, job="7"))
    _take(tmp_path)


@pytest.mark.parametrize("states", [None, {}, {"7": "COMPLETING"}])
def test_of_a_job_that_slurm_does_not_tell_of_the_beat_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: dict[str, str] | None
) -> None:
    monkeypatch.setattr(slurm, "query_states", lambda jobs: states)
    _left(tmp_path, replace(ELSEWHERE, job="7"))
    monkeypatch.setattr(hold, "STALE", 0.6)
    assert _take(tmp_path) > 0.3


def test_a_job_that_is_started_again_takes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _left(tmp_path, replace(ELSEWHERE, job="7"))
    _take(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "null", "\x00"])
def test_a_damaged_file_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / hold.NAME).write_text(text)
    _take(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_whose_folder_was_taken_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(hold, "BEAT", 0.02)

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    with hold_folder(tmp_path):
        before = (tmp_path / hold.NAME).stat().st_mtime
        _until(lambda: (tmp_path / hold.NAME).stat().st_mtime > before)  # it beats
        _left(tmp_path, ELSEWHERE)
        _until(lambda: bool(ended))
    assert ended == [2]
    assert Holder.of(tmp_path) == ELSEWHERE  # and leaves the other's file alone


def test_training_is_refused_before_it_writes(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    config = load_config("vim2_digits", ["data=synthetic", "data.length=64", "train.batch_size=8", "device=cpu"])
    with pytest.raises(UserError, match=f"process {other.pid} "):
        run_training(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {hold.NAME, ".lock"}


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    small = ["data=synthetic", "data.length=64", "data.workers=0", "train.batch_size=8", "train.max_steps=1"]
    config = load_config("vim2_digits", [*small, "tracking.plots=false", "device=cpu"])
    run_training(config, tmp_path / "run")
    kinds = [line["kind"] for line in journal.read(tmp_path / "run")]
    assert kinds == ["started", "ended"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "log.txt"}
    run_training(config, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "log.txt"} == before


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
