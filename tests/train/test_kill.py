"""A run that is killed again and again ends in the weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import Launched, started, steps_noted

from mmtrain.config import load_config
from mmtrain.inference.trained import load_trained
from mmtrain.train.session import train

STEPS = 24


def kill_when(job: Launched, condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Kill -9 as soon as ``condition`` holds; False if the process ended before."""
    end = time.monotonic() + seconds
    while (reached := job.running) and time.monotonic() < end:
        if condition():
            break
    job.process.kill()
    job.process.join()
    return reached and time.monotonic() < end


@pytest.mark.slow
def test_killed_five_times_and_once_while_saving(vision: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_config(vision), whole)
    chance = random.Random(0)
    saving = 2  # which of the kills waits for a checkpoint that is being written
    kills = torn = 0
    reached = 0
    while kills < 5:
        job = Launched(vision, killed, 1)
        if kills == saving:
            hit = kill_when(job, job.saving)
        else:
            goal = min(reached + chance.randint(1, 4), STEPS - 1)
            hit = kill_when(job, lambda goal=goal: steps_noted(killed) >= goal)  # type: ignore[misc]
        assert hit, job.said
        torn += any((killed / "checkpoints").glob("*.partial"))
        reached = max(reached, steps_noted(killed))
        kills += 1
    last = Launched(vision, killed, 1)
    assert last.end(120) == 0, last.said
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
    job = Launched(vision, folder, 1)
    while steps_noted(folder) < 4 and job.running:
        time.sleep(0.01)
    job.send_signal(which)
    assert job.end() == 128 + which, job.said
    assert "the same command resumes it" in job.said
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
    process = started(config, pair, 2)
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
    process = started(config, moved)
    while steps_noted(moved) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    job = Launched(config, moved, 2)
    assert job.end(120) == 0, job.said
    assert "resuming at step" in job.said
    a, b = (load_trained(folder, "last").model.state_dict() for folder in (whole, moved))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(vision: Path, tmp_path: Path) -> None:
    job = Launched(vision, tmp_path / "run", 2)
    begin = time.monotonic()
    while steps_noted(tmp_path / "run") < 2 and job.running:
        time.sleep(0.01)
    ranks = job.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert job.end() != 0
    assert time.monotonic() - begin < 60
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
