"""Time from the start of the process to the first step of a resumed run, with the command that a user calls."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer_parts.figure import Figure, median_of

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, config: str, overrides: list[str]) -> dict[str, Any]:
    """Run ``launch/submit.py`` and return the last ``start`` line of its metrics and the time of the call."""
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--config", config, "--local", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    began = time.time()
    done = subprocess.run(
        [*command, "--run-dir", str(folder), *overrides], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**[line for line in lines if line["kind"] == "start"][-1], "began": began}


def measure(folder: Path, *, config: str, overrides: list[str], repeats: int) -> Iterator[Figure]:
    """Train two steps with a checkpoint after each, then repeatedly delete the last checkpoint and resume."""
    overrides = ["data=synthetic", "data.length=256", "data.val_length=8", "train.batch_size=4", *overrides]
    overrides += ["train.max_steps=2", "train.log_every=1", "checkpoint.every_steps=1", "checkpoint.keep=2"]
    overrides += ["device=cpu", "eval.every_steps=2"]
    run = folder / "run"
    _run(run, config, overrides)
    size = sum(f.stat().st_size for f in (run / "checkpoints/step_00000001").iterdir())
    ready, done, outside = [], [], []
    for _ in range(repeats):
        _forget(run)
        start = _run(run, config, overrides)
        assert start["step"] == 1, start
        ready.append(start["ready_seconds"])
        done.append(start["first_step_seconds"])
        outside.append(start["time"] - start["began"])
    yield Figure(
        "restart",
        "process start to the first step of a resumed run",
        **median_of(ready),
        unit="s",
        target=10.0,
        how=f"{config}, launch/submit.py --local 1, a checkpoint of {size / 1e6:.0f} MB; median of {repeats};"
        f" first step done after {statistics.median(done):.1f} s ({statistics.median(outside):.1f} s by another clock)",
        detail={"ready_s": ready, "first_step_done_s": done, "first_step_done_seen_from_outside_s": outside},
    )


def _forget(run: Path) -> None:
    """Delete the result and the checkpoint of step 2, as if the run had been killed after step 1."""
    (run / "result.json").unlink()
    for path in sorted((run / "checkpoints/step_00000002").iterdir()):
        path.unlink()
    (run / "checkpoints/step_00000002").rmdir()
