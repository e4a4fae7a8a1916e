"""Shared by all tests: few threads, small data, and a way to run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards, 16 × 16 pixels."""
    from mmtrain.data.prepare.digits import prepare_digits

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(out, 16)
    return out


@pytest.fixture(scope="session")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of three noisy daily waves, 600 hours."""
    path = tmp_path_factory.mktemp("series") / "waves.csv"
    hours = np.arange(600)
    noise = np.random.default_rng(0).normal(scale=0.1, size=(600, 3))
    values = np.sin(2 * np.pi * (hours[:, None] / 24 + np.array([0.0, 0.3, 0.6]))) + noise
    stamps = np.datetime64("2026-01-01T00") + hours.astype("timedelta64[h]")
    rows = [",".join([str(t), *(f"{v:.4f}" for v in row)]) for t, row in zip(stamps, values, strict=True)]
    path.write_text("date,a,b,c\n" + "\n".join(rows) + "\n")
    return path


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``mmtrain …`` (or a script of ``launch/``) in an empty folder; returns the finished process."""

    def call(*arguments: object, cwd: Path = tmp_path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        words = [str(a) for a in arguments]
        head = [str(ROOT / words.pop(0))] if words[0].endswith(".py") else ["-m", "mmtrain"]
        return subprocess.run(
            [sys.executable, *head, *words],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call
