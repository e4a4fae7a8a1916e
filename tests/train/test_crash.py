"""A defect on one rank ends the whole job at once, and the one to blame is seen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launched import ROOT, Launched, alive, notes

#: Read by Python at its start, in a folder of PYTHONPATH: builds the fault into the ranks, not into the launcher.
_AT_START = """
import os, sys
if "RANK" in os.environ:
    sys.path.append({tests!r})
    from faults import Crash
    Crash(on=1, step=5)(int(os.environ["RANK"]))
"""


@pytest.mark.slow
def test_a_defect_on_one_rank_ends_the_job(series: Path, tmp_path: Path) -> None:
    """With a checkpoint being written after every step, and loader workers at work."""
    patched = tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(_AT_START.format(tests=str(ROOT / "tests" / "train")))
    options = ("data.workers=1", "checkpoint.every_steps=1", "tracking.samples=true", "tracking.plots=false")
    job = Launched(series, tmp_path / "run", 2, *options, path=f"{patched}:{ROOT}")
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
