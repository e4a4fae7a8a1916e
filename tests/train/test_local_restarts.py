"""``--local N --restarts K``: a killed rank does not end the run; a failing one, or one that is stopped, does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import TINY
from tests.train.compare import same_end
from tests.train.launched import Launched

pytestmark = pytest.mark.slow


def _wait_for_step(job: Launched, step: int) -> None:
    end = time.monotonic() + 60
    metrics = job.folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert job.running, job.said
        assert time.monotonic() < end, job.said
        time.sleep(0.05)


def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    """Four ranks: with two, any order of addition gives the same."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    job = Launched(config, tmp_path / "killed", 4, "train.max_steps=120", "--restarts", "1")
    _wait_for_step(job, 30)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.end(120) == 0, job.said
    assert "restarting all ranks from the newest checkpoint (0 restarts left)" in job.said
    assert "lost its connection to another rank (" in job.said
    assert "Traceback" not in job.said
    assert "Traceback" in (tmp_path / "killed" / "hangs" / "traceback_rank00000.txt").read_text()
    whole = Launched(config, tmp_path / "whole", 4, "train.max_steps=120")
    assert whole.end(120) == 0, whole.said
    assert same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_stopped_run_is_not_started_again(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    job = Launched(config, tmp_path / "run", 2, "train.max_steps=5000", "--restarts", "3")
    _wait_for_step(job, 3)
    job.send_signal(signal.SIGTERM)
    assert job.end() == 128 + signal.SIGTERM
    assert "restarting" not in job.said
