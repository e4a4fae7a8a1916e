"""Whether a Slurm job comes back, decided from what its tasks left in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.cluster import requeue
from mmtrain.cluster.task import torch_variables
from mmtrain.errors import UserError
from mmtrain.runs import journal, slurm
from mmtrain.runs.folder import newest_step
from mmtrain.runs.journal import JobAttempt
from mmtrain.runs.slurm import parse_duration

HERE = JobAttempt("7", 1)


def _fail(run: Path, rank: int, follows: bool, error: str = "ValueError: no") -> None:
    folder = HERE.failure_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"rank": rank, "node": f"node{rank}", "error": error, "text": "Traceback", "follows": follows}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(report))


def test_the_reason_is_what_the_tasks_left(tmp_path: Path) -> None:
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "lost"
    HERE.note_clean_stop(tmp_path, "SIGUSR2")
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "preempted"
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "lost"  # a note counts once
    HERE.note_clean_stop(tmp_path, "SIGUSR2")
    assert requeue.end_reason(tmp_path, HERE, 130, 120) == "timeout"
    HERE.note_clean_stop(tmp_path, "SIGUSR2")
    assert requeue.end_reason(tmp_path, HERE, None, 120) == "preempted"  # no time limit
    _fail(tmp_path, 3, follows=True)
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "lost"  # a rank that lost its connection is not the cause
    _fail(tmp_path, 2, follows=False)
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "failed"
    assert requeue.end_reason(tmp_path, JobAttempt("7", 2), 1000, 120) == "lost"  # that was another start
    (tmp_path / requeue.STOP).touch()
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "stopped"
    (tmp_path / "result.json").write_text("{}")
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "finished"


def test_causes_come_before_those_that_only_lost_their_connection(tmp_path: Path) -> None:
    _fail(tmp_path, 0, follows=True, error="RuntimeError: connection closed")
    _fail(tmp_path, 5, follows=False)
    (HERE.failure_folder(tmp_path) / "rank_00009.json").write_text("{")  # cut off by a kill
    assert [report["rank"] for report in HERE.failure_reports(tmp_path)] == [5, 0]


@pytest.mark.parametrize("reason", ["finished", "stopped", "failed"])
def test_what_is_over_does_not_come_back(tmp_path: Path, reason: str) -> None:
    assert not requeue.should_requeue(tmp_path, reason, None, 3)


def test_a_preemption_always_comes_back(tmp_path: Path) -> None:
    for _ in range(50):
        journal.record(tmp_path, "ended", job="7", restart=0, reason="preempted", step=0, requeued=True)
    assert requeue.should_requeue(tmp_path, "preempted", 0, 0)


def test_time_limits_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert requeue.should_requeue(tmp_path, "timeout", 1, 3)
    journal.record(tmp_path, "ended", job="7", restart=0, reason="timeout", step=9, requeued=True)
    assert requeue.should_requeue(tmp_path, "timeout", None, 3)
    assert not requeue.should_requeue(tmp_path, "timeout", 1, 3)
    assert "cluster.max_timeouts" in capsys.readouterr().out


def test_losses_are_counted_while_there_is_no_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose(step: int) -> None:
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True, exist_ok=True)
        journal.record(tmp_path, "ended", job="7", restart=0, reason="lost", step=step, requeued=True)

    lose(10)
    lose(10)
    assert newest_step(tmp_path) == 10
    assert requeue.should_requeue(tmp_path, "lost", None, 3)
    lose(10)
    assert not requeue.should_requeue(tmp_path, "lost", None, 3)
    assert "cluster.max_losses" in capsys.readouterr().out
    (tmp_path / "checkpoints/step_00000020").mkdir()
    assert requeue.should_requeue(tmp_path, "lost", None, 3)  # it got further


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("2:00", 120),
        ("1:02:03", 3723),
        ("2-12", 216000),
        ("1-00:00:01", 86401),
        ("1-1:30", 91800),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
        ("-5", None),
        ("1:2:3:4", None),
    ],
)
def test_durations_are_read_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


def test_a_torn_last_line_of_the_journal_is_left_out(tmp_path: Path) -> None:
    assert journal.read(tmp_path) == []
    assert journal.last_job(tmp_path) is None
    journal.record(tmp_path, "submitted", job="7", nodes="4", tasks=8)
    with (tmp_path / journal.NAME).open("a") as file:
        file.write('{"kind": "started", "jo')
    assert [line["kind"] for line in journal.read(tmp_path)] == ["submitted"]
    assert journal.last_job(tmp_path) == "7"


def test_nodes_at_fault_are_left_out_where_that_is_wanted(tmp_path: Path) -> None:
    _fail(tmp_path, 2, follows=False)
    report = HERE.failure_folder(tmp_path) / "rank_00002.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "bad_nodes": ["node3"]}))
    assert requeue.bad_nodes(tmp_path, HERE) == ["node3"]
    assert requeue.end_reason(tmp_path, HERE, 1000, 120) == "bad_nodes"
    assert not requeue.should_requeue(tmp_path, "bad_nodes", None, 3)
    assert requeue.should_requeue(tmp_path, "bad_nodes", None, 3, replace_nodes=True)
    for _ in range(3):
        journal.record(tmp_path, "ended", job="7", restart=0, reason="bad_nodes", step=0, requeued=True)
    assert not requeue.should_requeue(tmp_path, "bad_nodes", None, 3, replace_nodes=True)


def test_the_rendezvous_follows_from_the_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "hostnames", lambda nodes: ["node3", "node4"] if nodes == "node[3-4]" else [])
    step = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}
    expected |= {"MASTER_ADDR": "node3", "MASTER_PORT": "23456"}
    assert torch_variables({**step, "SLURM_LOCALID": "1"}) == expected
    several = torch_variables({**step, "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"})
    assert several == {**expected, "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        torch_variables(step)


def test_a_start_is_recorded_with_its_hosts_and_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "node[3-4]", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(slurm, "hostnames", lambda nodes: ["node3", "node4"])
    journal.record_start(tmp_path, 8)
    (line,) = journal.read(tmp_path)
    found = {name: line[name] for name in ("kind", "job", "restart", "hosts", "world")}
    assert found == {"kind": "started", "job": "7", "restart": 2, "hosts": ["node3", "node4"], "world": 8}
