"""A rank that is stopped ends the job, which says who it was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mmtrain.parallel.watchdog import EXIT_HANG
from tests.train.test_kill import start, steps_noted


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_job_ends(vision: Path, tmp_path: Path, stopped: int) -> None:
    config, folder = tmp_path / "patient.yaml", tmp_path / "run"
    config.write_text(
        vision.read_text().replace("max_steps: 24", "max_steps: 5000").replace("epochs: 1.3", "epochs: 999")
    )
    with config.open("a") as file:
        file.write("parallel: {step_timeout: 4}\n")
    process = start(config, folder, processes=2)
    while steps_noted(folder) < 4 and process.poll() is None:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = sorted(map(int, children))  # started in the order of their ranks
    os.kill(ranks[stopped], signal.SIGSTOP)
    begin = time.monotonic()
    try:
        _, said = process.communicate(timeout=90)
    finally:
        for pid in ranks:  # a stopped process does not end by itself
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    assert process.returncode == EXIT_HANG, said
    # 4 s without a beat, some seconds to see that nobody answers, 10 s of grace before the launcher kills the rank
    assert time.monotonic() - begin < 60
    assert f"rank {stopped} (" in said
    assert "does not answer" in said
    stacks = folder / "hangs" / f"hang_rank{1 - stopped:05d}.txt"
    assert "loop.py" in stacks.read_text()
