"""Run folders made by hand, with the files that a run writes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from mmtrain.config import load_config, to_yaml
from mmtrain.runs import journal

#: When the first line of every run made here was written, in Unix seconds.
BEGIN = 1_790_000_000.0
HERE = socket.gethostname()


def make_run(
    path: Path, lines: int = 5, *overrides: str, config: str = "vim2_digits", step_seconds: float = 2.0
) -> Path:
    """A run of batches of 10 out of 100 samples for 3 epochs, so 30 steps: a line every second step, from BEGIN on.

    The loss falls from 2; an evaluation follows every fifth line, top-1 10, 20, ….
    """
    path.mkdir(parents=True)
    batches = ["train.batch_size=10", "train.epochs=3", "train.log_every=2"]
    (path / "config.yaml").write_text(to_yaml(load_config(config, [*batches, *overrides])))
    for i in range(1, lines + 1):
        step, moment = 2 * i, BEGIN + 2 * i * step_seconds
        train = {"loss": 2 / i, "lr": 1e-3 / i, "grad_norm": 50.0 / i, "samples_per_second": 10 / step_seconds}
        place = {"step": step, "samples": 10 * step, "epoch": step / 10}
        parts = {"step_seconds": step_seconds, "data_seconds": step_seconds / 4, "forward_seconds": step_seconds / 2}
        averaging = {f"averaging_{name}": 0.01 * i for name in ("alpha", "beta", "theta", "gamma")}
        write(path, "train", moment, **place, **train, **parts, **averaging)
        if i % 5 == 0:
            results = {"split": "val", "step": step, "epoch": step / 10, "loss": 2 / i, "top1": 2.0 * i, "mse": 1 / i}
            write(path, "eval", moment + 1, **results)
    return path


def write(path: Path, kind: str, moment: float, **values: Any) -> None:
    """A line of metrics."""
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, **values, "time": moment}) + "\n")


def noted(path: Path, kind: str, moment: float = BEGIN, **values: Any) -> None:
    """A line of the journal, as of ``moment``."""
    with (path / journal.NAME).open("a") as file:
        file.write(json.dumps({"kind": kind, **values, "time": moment}) + "\n")
