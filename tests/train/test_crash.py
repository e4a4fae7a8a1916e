"""A defect on one rank ends the whole job at once, and the one to blame is seen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from faults import Crash
from launched import Launched, alive, notes


@pytest.mark.slow
def test_a_defect_on_one_rank_ends_the_job(series: Path, tmp_path: Path) -> None:
    """With a checkpoint being written after every step, and loader workers at work."""
    options = ("data.workers=1", "checkpoint.every_steps=1", "tracking.samples=true", "tracking.plots=false")
    job = Launched(series, tmp_path / "run", 2, *options, fault=Crash(on=1, step=5))
    processes: set[int] = set()
    begin = time.monotonic()
    while job.running and 4 not in notes(tmp_path / "run", 0) and time.monotonic() < begin + 120:
        processes |= set(job.processes())
        time.sleep(0.02)
    crashed = time.monotonic()
    assert job.end(300) == 1, job.said
    # a second or two; on a busy machine the start tells how busy it is
    assert time.monotonic() - crashed < 10 + (crashed - begin)
    assert "RuntimeError: a defect at step 5" in job.said
    assert "in change" in job.said  # the traceback down to the line
    first = next(line for line in job.said.splitlines() if "failed: " in line or "Traceback" in line)
    assert first.endswith("rank 1 failed: RuntimeError: a defect at step 5")
    assert "rank 0 failed" not in job.said
    time.sleep(1)
    assert len(processes) >= 4  # two ranks, a worker each
    assert not [process for process in processes if alive(process)]
