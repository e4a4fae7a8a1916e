"""The order to requeue, many times: each job comes back exactly once, and none takes the order for its own death."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from mmtrain.runs import journal
from mmtrain.train.preemption import StopRequest
from tests.slurm.cluster import Cluster

#: Two tasks that leave as preempted ones do at the first start, and finish at the second.
_SCRIPT = """#!/bin/bash
trap : TERM USR1 USR2 CONT
srun --kill-on-bad-exit=1 bash -c '
  if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then
    [ "$SLURM_PROCID" = 0 ] && echo -n SIGUSR2 > "{run}/.left_${{SLURM_JOB_ID}}_0"
  else
    [ "$SLURM_PROCID" = 0 ] && echo "{{}}" > "{run}/result.json"
  fi
  exit 0'
{python} -m mmtrain.cluster.requeue "{run}" $?
"""


@pytest.mark.slow
def test_fifty_jobs_come_back_once_each(cluster: Cluster, tmp_path: Path) -> None:
    jobs: dict[str, Path] = {}
    for number in range(50):
        run = tmp_path / f"run{number}"
        run.mkdir()
        script = run / "job.sh"
        script.write_text(_SCRIPT.format(run=run, python=sys.executable))
        words = ("--parsable", "--requeue", "--ntasks=2", "--cpus-per-task=1", "-o", f"{run}/log.txt", "--time=30")
        jobs[cluster.ask("sbatch", *words, str(script)).strip()] = run
    end = time.monotonic() + 240
    while cluster.ask("squeue", "-h", "-j", ",".join(jobs)) or not all(
        (run / "result.json").exists() for run in jobs.values()
    ):
        assert time.monotonic() < end, cluster.ask("squeue")
        time.sleep(1)
    for job, run in jobs.items():
        shown = cluster.ask("scontrol", "show", "job", job)
        assert "Restarts=1 " in shown, shown
        assert "JobState=COMPLETED" in shown, shown
        ended = [(line["reason"], line["requeued"]) for line in journal.read(run) if line["kind"] == "ended"]
        assert ended == [("preempted", True), ("finished", False)]


def test_looking_for_a_signal_costs_nothing() -> None:
    """At most a thousandth of a step of 50 ms."""
    with StopRequest(seconds=1000) as stop:
        began = time.thread_time()
        for _ in range(1000):
            assert stop.received is None
        assert (time.thread_time() - began) / 1000 < 50e-6
