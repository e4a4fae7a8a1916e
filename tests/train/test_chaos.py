"""Thirty kills of random ranks: the run ends in the same bits, and every sample of every epoch counts once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from compare import result, same_end
from launched import Launched, alive, notes

KILLS = 30
WORLD, MICROS, BATCH = 2, 2, 32
#: Windows of the waves that training sees: 420 rows, look-back 48, horizon 24.
SAMPLES = 349
EPOCHS = 25
#: torch's loader workers look every 5 seconds whether their process still lives.
ORPHANS_END = 12.0


@pytest.fixture
def config(waves: Path, tmp_path: Path) -> Path:
    path = tmp_path / "chaos.yaml"
    path.write_text(f"""
model: {{name: tsm2, lookback: 48, horizon: 24, dim: 8, depth: 1, dropout: 0.2}}
data: {{kind: series, path: {waves}, split: ratio, workers: 1}}
task: {{kind: forecasting}}
train: {{epochs: {EPOCHS}, batch_size: {BATCH}, accumulation: {MICROS}, ema_decay: 0.9, log_every: 5}}
eval: {{every_epochs: 5}}
checkpoint: {{every_steps: 4, asynchronous: true}}
tracking: {{samples: true, plots: false}}
threads: 1
""")
    return path


@pytest.mark.slow
def test_thirty_kills_of_random_ranks(config: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Launched(config, whole, WORLD).end(600) == 0

    chance = random.Random(0)
    saving, resumed, orphans = 0, 0, set()
    for number in range(KILLS):
        job = Launched(config, killed, WORLD)
        # every fourth while a checkpoint is being written, every fourth at any moment of the start, the others in steps
        condition = [job.saving, _moment(chance, job), _steps(chance, job), _steps(chance, job)][number % 4]
        _wait(job, lambda condition=condition, job=job: len(job.ranks()) == WORLD and condition())
        victim = job.ranks()[chance.randrange(WORLD)]
        orphans |= set(job.processes())
        hit = job.saving()
        os.kill(victim, signal.SIGKILL)
        assert job.end(300) != 0, job.said
        assert "was killed by SIGKILL" in job.said, job.said
        saving += hit
        resumed += "resuming at step" in job.said
        assert not any(alive(rank) for rank in (victim, *job.ranks()))
    ended = time.monotonic()

    job = Launched(config, killed, WORLD)
    assert job.end(600) == 0, job.said
    assert saving >= 5
    assert resumed >= KILLS // 3
    time.sleep(max(0.0, ended + ORPHANS_END - time.monotonic()))
    assert not [process for process in orphans if alive(process)]

    assert same_end(whole, killed)
    assert result(whole) == result(killed)
    assert not list((killed / "checkpoints").glob("*.partial"))
    for folder in (whole, killed):
        _each_sample_once_an_epoch(folder)


def _wait(job: Launched, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert job.running, f"the run ended before its kill: {job.said}"
        assert time.monotonic() < end, job.said
        time.sleep(0.001)


def _moment(chance: random.Random, job: Launched) -> Callable[[], bool]:
    until = time.time() + chance.uniform(0.1, 2.0)
    return lambda: time.time() >= until


def _steps(chance: random.Random, job: Launched) -> Callable[[], bool]:
    """After so many steps of this launch, and a random moment more."""
    file = job.folder / "samples" / "rank_00000.jsonl"
    lines, more, pause = _lines(file), chance.randint(0, 6), chance.uniform(0, 0.05)

    def reached() -> bool:
        if _lines(file) <= lines + more:
            return False
        time.sleep(pause)
        return True

    return reached


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _each_sample_once_an_epoch(folder: Path) -> None:
    """The stream of samples, put together from what each rank consumed in each step, is whole epochs one by one."""
    steps = -(-EPOCHS * SAMPLES // BATCH)
    stream: list[int] = [-1] * (steps * BATCH)
    size = BATCH // (WORLD * MICROS)
    for rank in range(WORLD):
        taken = notes(folder, rank)
        assert sorted(taken) == list(range(steps))
        for step, times in taken.items():
            assert all(samples == times[-1] for samples in times), f"step {step} was another one after a restart"
            assert len(times[-1]) == MICROS * size
            for place, sample in enumerate(times[-1]):
                micro, which = divmod(place, size)
                stream[step * BATCH + micro * WORLD + rank + which * WORLD * MICROS] = sample
    for epoch in range(EPOCHS):
        assert sorted(stream[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES)), f"epoch {epoch}"
    rest = stream[EPOCHS * SAMPLES :]
    assert len(set(rest)) == len(rest)
