"""The state of a run: told from its folder, Slurm's states and the processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtrain.runs import status as told
from mmtrain.runs.reader import find_runs, read_run
from mmtrain.runs.status import Environment, runs_training, state_of, status
from tests.cluster.made import BEGIN, HERE, make_run, noted, write
from tests.conftest import ROOT

LAST = BEGIN + 21  # of the run that make_run makes: its evaluation at step 10
HOSTS = ["n1", "n1", "n2"]


def world(now: float = LAST + 5, slurm: dict[str, str] | None = None, *pids: int) -> Environment:
    return Environment(now, HERE, slurm, frozenset(pids))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def submitted(run: Path, **started: Any) -> None:
    noted(run, "submitted", BEGIN - 9, job="7", nodes="2", tasks=8)
    if started:
        noted(run, "started", BEGIN, job="7", hosts=HOSTS, world=3, **started)


# ---------------------------------------------------------------- Slurm


@pytest.mark.parametrize("known", ["PENDING", "CONFIGURING"])
def test_a_job_that_never_started_is_queued(run: Path, known: str) -> None:
    submitted(run)
    assert state_of(read_run(run), world(slurm={"7": known})) == "queued"


def test_a_job_that_waits_again_is_requeued(run: Path) -> None:
    submitted(run, restart=0)
    assert state_of(read_run(run), world(slurm={"7": "PENDING"})) == "requeued"
    noted(run, "ended", LAST, job="7", restart=0, reason="preempted", requeued=True, step=10)
    assert state_of(read_run(run), world(slurm={"7": "REQUEUED"})) == "requeued"
    assert state_of(read_run(run), world(slurm=None)) == "requeued"
    assert state_of(read_run(run), world(slurm={"7": "RUNNING"})) == "requeued"  # the batch script is about to end
    assert state_of(read_run(run), world(slurm={})) == "preempted"  # it should have come back, and did not


def test_a_running_job_is_running_until_it_is_quiet_for_long(run: Path) -> None:
    submitted(run, restart=0)
    slurm = {"7": "RUNNING"}
    assert state_of(read_run(run), world(LAST + 59, slurm)) == "running"
    assert state_of(read_run(run), world(LAST + 61, slurm)) == "stalled"


def test_slow_steps_and_long_evaluations_are_no_stall(tmp_path: Path) -> None:
    slow = make_run(tmp_path / "slow", step_seconds=20.0)
    noted(slow, "started", BEGIN, job="7", hosts=HOSTS, world=3, restart=0)
    last = BEGIN + 201
    # a line every 2 steps of 20 s, and 10 more steps
    assert state_of(read_run(slow), world(last + 239, {"7": "RUNNING"})) == "running"
    assert state_of(read_run(slow), world(last + 241, {"7": "RUNNING"})) == "stalled"
    write(slow, "eval", last + 1000, split="val", step=10, top1=1.0)
    assert state_of(read_run(slow), world(last + 2900, {"7": "RUNNING"})) == "running"


def test_before_its_first_step_a_job_may_take_its_time(run: Path) -> None:
    submitted(run, restart=0)
    noted(run, "started", LAST + 100, job="7", hosts=HOSTS, world=3, restart=1)
    facts = read_run(run)
    facts = type(facts)(**{**facts.__dict__, "written": LAST + 100})
    assert state_of(facts, world(LAST + 1800, {"7": "RUNNING"})) == "running"
    assert state_of(facts, world(LAST + 2000, {"7": "RUNNING"})) == "stalled"


@pytest.mark.parametrize(
    ("known", "state"),
    [
        (None, "lost"),
        ("COMPLETED", "lost"),
        ("CANCELLED", "stopped"),
        ("NODE_FAIL", "failed"),
        ("TIMEOUT", "timeout"),
        ("PREEMPTED", "preempted"),
    ],
)
def test_a_job_that_is_gone_without_a_word(run: Path, known: str | None, state: str) -> None:
    submitted(run, restart=0)
    assert state_of(read_run(run), world(slurm={"7": known} if known else {})) == state


@pytest.mark.parametrize("reason", ["failed", "stopped", "preempted", "timeout", "lost"])
def test_a_job_that_ended_tells_why(run: Path, reason: str) -> None:
    submitted(run, restart=0)
    noted(run, "ended", LAST, job="7", restart=0, reason=reason, requeued=False, step=10)
    for slurm in ({}, {"7": "COMPLETING"}, {"7": "FAILED"}):
        assert state_of(read_run(run), world(slurm=slurm)) == reason


def test_where_slurm_cannot_be_asked_the_files_tell(run: Path) -> None:
    submitted(run)
    assert state_of(read_run(run), world()) == "queued"
    noted(run, "started", BEGIN, job="7", hosts=HOSTS, world=3, restart=0)
    assert state_of(read_run(run), world()) == "running"
    assert state_of(read_run(run), world(LAST + 1000)) == "lost"


def test_the_newest_job_counts(run: Path) -> None:
    submitted(run, restart=0)
    noted(run, "ended", LAST, job="7", restart=0, reason="failed", requeued=False, step=10)
    noted(run, "submitted", LAST + 1, job="8", nodes="4", tasks=8)
    assert state_of(read_run(run), world(slurm={"8": "PENDING"})) == "queued"
    assert told.nodes(read_run(run)) == "4"


# ---------------------------------------------------------------- this machine


def test_a_run_of_this_machine_lives_with_its_process(run: Path) -> None:
    noted(run, "started", BEGIN, job=None, restart=0, hosts=[HERE], world=1, pid=77, host=HERE)
    assert state_of(read_run(run), world(LAST + 5, None, 77)) == "running"
    assert state_of(read_run(run), world(LAST + 500, None, 77)) == "stalled"
    assert state_of(read_run(run), world(LAST + 5, None)) == "lost"
    noted(run, "ended", LAST + 3, job=None, restart=0, reason="stopped", requeued=False, step=10)
    assert state_of(read_run(run), world(LAST + 5, None, 77)) == "stopped"


def test_a_run_of_another_machine_is_told_by_its_files(run: Path) -> None:
    noted(run, "started", BEGIN, job=None, restart=0, hosts=["far"], world=1, pid=77, host="far")
    assert state_of(read_run(run), world(LAST + 5, None, 77)) == "running"
    assert state_of(read_run(run), world(LAST + 500, None, 77)) == "lost"


def test_a_process_is_ours_only_by_its_command_line() -> None:
    sleep = "import time, sys; sys.stdout.write('.'); sys.stdout.flush(); time.sleep(60)"
    for words, ours in ((["mmtrain"], True), (["launch/submit.py"], True), (["other"], False)):
        command = [sys.executable, "-S", "-c", sleep, *words]
        # away from this checkout, whose path may name mmtrain
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/", env={}) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            assert runs_training(process.pid) is (ours or "mmtrain" in sys.executable)
            process.kill()
    assert not runs_training(process.pid)


# ---------------------------------------------------------------- without a journal, torn lines


def test_runs_without_a_journal_are_finished_or_not(run: Path) -> None:
    assert state_of(read_run(run), world()) == "unfinished"
    (run / "result.json").write_text(json.dumps({"step": 30, "test": {"top1": 12.5}}))
    shown = status(read_run(run), world())
    assert (shown.state, shown.test) == ("finished", 12.5)


def test_figures_of_a_run(run: Path) -> None:
    noted(run, "started", BEGIN, job="7", hosts=HOSTS, world=3, restart=0)
    noted(run, "started", BEGIN + 1, job="7", hosts=HOSTS, world=3, restart=1)
    shown = status(read_run(run), world(slurm={"7": "RUNNING"}))
    assert (shown.step, shown.total, shown.loss, shown.speed) == (10, 30, 0.4, 5.0)
    assert shown.eta == 20 * 2.0
    assert (shown.restarts, shown.nodes) == (1, "2")
    assert (shown.metric, shown.best, shown.test) == ("top1", 10.0, None)
    assert shown.model == "vim2_nano"


def test_max_steps_and_a_forecaster(tmp_path: Path) -> None:
    run = make_run(tmp_path / "series", 10, "train.max_steps=25", config="tsm2_traffic")
    shown = status(read_run(run), world())
    assert shown.total == 25
    assert (shown.metric, shown.best) == ("mse", 0.1)


def test_torn_lines_and_files_are_left_out(run: Path) -> None:
    noted(run, "started", BEGIN, job="7", hosts=HOSTS, world=3, restart=0)
    for name in ("metrics.jsonl", "jobs.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"kind": "train", "step": 99, "lo\n12\n[]\n{"kind": "tr\xff')
    (run / "result.json").write_text('{"step": 3')
    shown = status(read_run(run), world(slurm={"7": "RUNNING"}))
    assert (shown.state, shown.step) == ("running", 10)
    (run / "config.yaml").write_text("model: [vim2")
    assert status(read_run(run), world(slurm={})).model == "?"


def test_an_empty_folder_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", 0)
    shown = status(read_run(run), world())
    assert (shown.step, shown.total, shown.loss, shown.eta, shown.best) == (0, None, None, None, None)


def test_of_a_long_run_the_newest_lines_are_read_and_all_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", 600)
    facts = read_run(run, recent=50)
    assert len(facts.of_kind("train")) in (40, 41)  # every sixth of the newest 50 is an evaluation
    assert len(facts.of_kind("eval")) == 120
    assert facts.waits == [1.0] * 120
    assert len(read_run(run, recent=None).of_kind("train")) == 600


# ---------------------------------------------------------------- all runs together


def test_one_question_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def states(jobs: list[str]) -> dict[str, str]:
        asked.append(jobs)
        return {"1": "RUNNING", "2": "PENDING"}

    monkeypatch.setattr(told.slurm, "query_states", states)
    for job in "123":
        noted(make_run(tmp_path / f"run{job}"), "submitted", job=job, nodes="1", tasks=1)
    found = {shown.path.name: shown.state for shown in told.run_statuses(find_runs(tmp_path))}
    assert asked == [["1", "2", "3"]]
    assert found == {"run1": "stalled", "run2": "queued", "run3": "lost"}


@pytest.mark.parametrize("squeue", ["exit 1", "sleep 5"])
def test_a_slurm_that_does_not_answer_makes_no_run_lost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run_command = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **given: run_command(*words, **{**given, "timeout": 1}))
    submitted(run)
    assert [shown.state for shown in told.run_statuses([run])] == ["queued"]


def test_no_torch_is_needed() -> None:
    code = "import sys, mmtrain.cli.runs, mmtrain.runs.table, mmtrain.cluster.stop, mmtrain.report, mmtrain.cli.runs\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, cwd=ROOT)


def test_a_run_without_metrics_is_at_step_0(tmp_path: Path) -> None:
    assert told.last_step(read_run(make_run(tmp_path / "run", 0))) == 0
    assert told.last_step(read_run(make_run(tmp_path / "other", 3))) == 6
