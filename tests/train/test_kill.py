"""A run that is killed again and again ends in the weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmtrain.config import load_config
from mmtrain.inference.trained import load_trained
from mmtrain.train.session import train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def start(config: Path, folder: Path, processes: int = 1) -> subprocess.Popen[str]:
    launcher = str(ROOT / "launch" / "submit.py")
    return subprocess.Popen(
        [sys.executable, launcher, "--config", str(config), "--run-dir", str(folder), "--local", str(processes)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_noted(folder: Path) -> int:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["step"] for line in lines), default=0)


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Kill -9 as soon as ``condition`` holds; False if the process ended before."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            process.kill()
            process.wait()
            return True
    process.kill()
    process.wait()
    return False


@pytest.mark.slow
def test_killed_five_times_and_once_while_saving(vision: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_config(vision), whole)
    chance = random.Random(0)
    saving = 2  # which of the kills waits for a checkpoint that is being written
    kills = torn = 0
    reached = 0
    while kills < 5:
        process = start(vision, killed)
        if kills == saving:
            before = time.time()

            def writing(since: float = before) -> bool:
                folder = killed / "checkpoints"
                return any(p.stat().st_mtime > since for p in folder.glob("*.partial")) if folder.is_dir() else False

            hit = kill_when(process, writing)
        else:
            goal = min(reached + chance.randint(1, 4), STEPS - 1)
            hit = kill_when(process, lambda goal=goal: steps_noted(killed) >= goal)  # type: ignore[misc]
        assert hit, process.stderr.read() if process.stderr else ""
        torn += any((killed / "checkpoints").glob("*.partial"))
        reached = max(reached, steps_noted(killed))
        kills += 1
    last = start(vision, killed)
    assert last.wait(timeout=120) == 0
    assert torn >= 1, "no kill fell into the writing of a checkpoint"
    assert not list((killed / "checkpoints").glob("*.partial"))
    for which in ("last", "best"):
        a, b = (load_trained(folder, which).model.state_dict() for folder in (whole, killed))
        assert all(torch.equal(a[name], b[name]) for name in a)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert results[0] == results[1]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
@pytest.mark.slow
def test_a_signal_saves_and_leaves(vision: Path, tmp_path: Path, which: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start(vision, folder)
    while steps_noted(folder) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(which)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + which, said
    assert "the same command goes on" in said
    newest = max((folder / "checkpoints").iterdir())
    # the step it was in when the signal came, not the last periodic checkpoint
    assert int(newest.name.removeprefix("step_")) == steps_noted(folder)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(vision: Path, tmp_path: Path) -> None:
    """Data parallel over gloo: the same samples, augmentation, mixtures and masks, so the same weights."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    config = tmp_path / "short.yaml"
    config.write_text(vision.read_text().replace("max_steps: 24", "max_steps: 8"))
    train(load_config(config), alone)
    process = start(config, pair, processes=2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    a, b = (load_trained(folder, "last").model.state_dict() for folder in (alone, pair))
    for name in a:
        # the order of summation differs: 8 AdamW steps of 3e-3 amplify the last bits
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    losses = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (alone, pair)
    ]
    for one, two in zip(*[[line["loss"] for line in run if line["kind"] == "train"] for run in losses], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    results = [json.loads((folder / "result.json").read_text())["test"] for folder in (alone, pair)]
    assert results[0]["samples"] == results[1]["samples"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(vision: Path, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    config = tmp_path / "short.yaml"
    config.write_text(vision.read_text().replace("max_steps: 24", "max_steps: 8"))
    train(load_config(config), whole)
    process = start(config, moved)
    while steps_noted(moved) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process = start(config, moved, processes=2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "resuming at step" in said
    a, b = (load_trained(folder, "last").model.state_dict() for folder in (whole, moved))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(vision: Path, tmp_path: Path) -> None:
    process = start(vision, tmp_path / "run", processes=2)
    begin = time.monotonic()
    while steps_noted(tmp_path / "run") < 2 and process.poll() is None:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - begin < 60
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
