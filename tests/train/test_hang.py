"""A rank that is stopped ends the job, which says who it was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launched import Launched, steps_noted

from mmtrain.parallel.watchdog import EXIT_HANG


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_job_ends(vision: Path, tmp_path: Path, stopped: int) -> None:
    config, folder = tmp_path / "patient.yaml", tmp_path / "run"
    config.write_text(
        vision.read_text().replace("max_steps: 24", "max_steps: 5000").replace("epochs: 1.3", "epochs: 999")
    )
    with config.open("a") as file:
        file.write("parallel: {step_timeout: 4}\n")
    job = Launched(config, folder, 2)
    while steps_noted(folder) < 4 and job.running:
        time.sleep(0.01)
    ranks = job.ranks()
    os.kill(ranks[stopped], signal.SIGSTOP)
    begin = time.monotonic()
    try:
        assert job.end(90) == EXIT_HANG, job.said
    finally:
        for pid in ranks:  # a stopped process does not end by itself
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    # 4 s without a beat, some seconds to see that nobody answers, 10 s of grace before the launcher kills the rank
    assert time.monotonic() - begin < 60
    assert f"rank {stopped} (" in job.said
    assert "does not respond" in job.said
    stacks = folder / "hangs" / f"hang_rank{1 - stopped:05d}.txt"
    assert "loop.py" in stacks.read_text()
