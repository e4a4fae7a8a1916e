"""The batch script that a configuration becomes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mmtrain.cluster import job as job_module
from mmtrain.cluster import requeue
from mmtrain.cluster.job import describe, submit
from mmtrain.config import load_config
from mmtrain.runs import journal


def test_the_signal_and_the_margin_are_those_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = ["cluster.gpus_per_node=0", "cluster.nodes=2"]
    usual = describe(load_config("vim2_digits", job), str(tmp_path / "run"))
    assert "#SBATCH --signal=USR2@120" in usual
    other = describe(
        load_config("vim2_digits", [*job, "cluster.signal=TERM", "cluster.margin=300"]), str(tmp_path / "run")
    )
    assert "#SBATCH --signal=TERM@300" in other
    assert "--margin 300" in other
    assert list(tmp_path.iterdir()) == []


def test_a_new_submission_forgets_the_request_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Executor:
        def __init__(self, folder: Path) -> None:
            pass

        def update_parameters(self, **parameters: object) -> None:
            pass

        def submit(self, task: object) -> SimpleNamespace:
            return SimpleNamespace(job_id="7")

    run = tmp_path / "run"
    run.mkdir()
    (run / requeue.STOP).touch()
    monkeypatch.setattr("submitit.SlurmExecutor", Executor)
    monkeypatch.setattr(job_module, "_check", lambda config, path: None)
    assert "7" in submit(load_config("vim2_digits", ["cluster.gpus_per_node=0"]), str(run))
    assert not (run / requeue.STOP).exists()
    assert journal.last_job(run) == "7"


def test_the_lines_of_a_query_are_joined() -> None:
    assert job_module._query("printf", r"gpu\ncpu\ngpu\n") == "gpu, cpu"
