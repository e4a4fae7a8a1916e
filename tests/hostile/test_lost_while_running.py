"""What is taken from a run while it trains: its folder, its loader workers, its standard streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmtrain.cluster.task import run_training
from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.train import loop

SMALL = ["data=synthetic", "data.length=64", "train.batch_size=8", "device=cpu", "tracking.plots=false"]


def _at_step_2(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    seed_step = loop.seed_step

    def seeded(seed: int, step: int, rank: int) -> None:
        if step == 2:
            action()
        seed_step(seed, step, rank)

    monkeypatch.setattr(loop, "seed_step", seeded)


@pytest.mark.parametrize("how", ["deleted", "moved"])
@pytest.mark.parametrize("log_every", [1, 1000])
@pytest.mark.slow
def test_a_folder_that_is_gone_is_one_message(
    how: str, log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    _at_step_2(monkeypatch, lambda: run.rename(aside))
    config = load_config("vim2_digits", [*SMALL, "data.workers=0", "train.max_steps=4", f"train.log_every={log_every}"])
    with pytest.raises(UserError, match=r"the run folder was deleted or moved during training .* --run-dir"):
        run_training(config, run)
    assert not (run / "result.json").exists()
    if how == "moved":  # the run continues where it is now
        monkeypatch.undo()
        run_training(config, aside)
        assert (aside / "result.json").exists()


def test_a_killed_loader_worker_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        for child in psutil.Process().children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)

    _at_step_2(monkeypatch, kill)
    config = load_config("vim2_digits", [*SMALL, "data.workers=1", "train.max_steps=30"])
    with pytest.raises(UserError, match=r"a data worker died .*Reduce data\.workers"):
        run_training(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("closed", "arguments", "status"),
    [
        ("2>&-", "configs", 0),
        (">&-", "configs", 0),
        ("<&- >&- 2>&-", "configs", 0),
        ("2>&-", "runs nowhere", 2),
    ],
)
def test_closed_streams_change_no_status(closed: str, arguments: str, status: int, tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m mmtrain {arguments} {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == status
    assert "Traceback" not in done.stdout + done.stderr
