"""Variables of Slurm and torchrun that are wrong, foreign, or not backed by Slurm's programs."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from mmtrain.cli import submit
from mmtrain.cli.app import run_app
from mmtrain.cluster import local
from mmtrain.errors import UserError
from mmtrain.parallel.ranks import init_distributed, world_size
from mmtrain.runs import journal, slurm

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FOREIGN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "")  # so that what the code deletes comes back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "²", "1e3", "0x1"])
def test_a_rank_that_is_no_number_is_one_message(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", text)
    with pytest.raises(SystemExit) as ended:
        run_app(lambda: None)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: environment variable RANK={text!r}: must be an integer")


@pytest.mark.parametrize("text", ["abc", "0", "-2", "1.5"])
def test_a_world_size_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match=r"WORLD_SIZE=.* at least 1.*unset WORLD_SIZE"):
        world_size()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "but RANK is 2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_variables_that_do_not_fit_are_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said), init_distributed("cpu"):
        pass


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", " ")
    assert world_size() == 1


def test_a_launcher_does_not_look_at_the_ranks_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**FOREIGN, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(local, "run_training", lambda *_: seen.append(dict(os.environ)))
    submit.submit_command([], config="vim2_digits", local=1, run_dir=str(tmp_path), cluster="auto", restarts=0)
    (found,) = seen
    assert not set(found) & {*FOREIGN, "TORCHELASTIC_USE_AGENT_STORE"}


@pytest.mark.parametrize("nodes", ["node7", "node[1-2]", None])
def test_a_container_of_a_slurm_job_has_no_slurm(
    nodes: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if nodes is not None:
        monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    assert slurm.seconds_left("7") is None
    journal.record_start(tmp_path, 1)
    (line,) = journal.read(tmp_path)
    expected: dict[str, Any] = {"kind": "started", "job": "7", "restart": 0, "world": 1}
    assert line.items() >= expected.items()
    assert line["hosts"] == ([nodes] if nodes == "node7" else [socket.gethostname()])


def test_what_needs_scontrol_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="scontrol is not available on this machine"):
        slurm.hostnames("node[1-2]")


def test_a_restart_count_that_is_none_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "abc")
    assert slurm.restart_count() == 0
