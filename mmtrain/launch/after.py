"""Run by the batch script when all tasks of a Slurm job have ended: decides whether the job comes back.

    python -m mmtrain.launch.after RUN STATUS --max-timeouts N --max-losses N

A job that was preempted or came near its time limit is put back into the queue once; so is one that lost a node or a
rank without a word, unless that happens again and again without a new checkpoint. A finished one is not, nor one in
which a rank raised an error, nor one that somebody stopped or cancelled. The decision is taken here, after the tasks,
since a requeue from within a task kills the very process that asks for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.launch import journal, slurm
from mmtrain.launch.outcome import Place, newest_step

#: A file in the run folder by which a user says that the run shall not come back.
STOP = "stop.request"

#: A job with less time left than its margin and this many seconds left because of its time limit.
_SLACK = 60.0


def reason_of(run: Path, place: Place, seconds_left: float | None, margin: float) -> str:
    """Why the job ended, one of :data:`mmtrain.launch.journal.REASONS`."""
    note = place.take_note(run)
    if (run / "result.json").exists():
        return "finished"
    if (run / STOP).exists():
        return "stopped"
    if any(not report["follows"] for report in place.reports(run)):
        return "failed"
    if seconds_left is not None and seconds_left <= margin + _SLACK:
        return "timeout"
    return "preempted" if note is not None else "lost"


def comes_back(run: Path, reason: str, max_timeouts: int | None, max_losses: int) -> bool:
    """Whether a job that ended for ``reason`` is put back into the queue. Prints why not."""
    if reason in ("finished", "stopped", "failed"):
        return False
    ended = [line for line in journal.read(run) if line["kind"] == "ended"]
    if reason == "timeout":
        timeouts = sum(line["reason"] == "timeout" for line in ended)
        if max_timeouts is not None and timeouts >= max_timeouts:
            print(f"{run}: {timeouts} time limits before this one (cluster.max_timeouts): the job does not come back")
            return False
    if reason == "lost":
        losses, step = 0, newest_step(run)
        for line in reversed(ended):
            if line["reason"] != "lost" or line["step"] != step:
                break
            losses += 1
        if losses >= max_losses:
            print(
                f"{run}: a rank or node was lost {losses + 1} times in a row without a new checkpoint"
                " (cluster.max_losses): the job does not come back. The logs of the ranks say more: mmtrain runs logs"
            )
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("status", type=int)
    parser.add_argument("--margin", type=float, default=0.0)
    parser.add_argument("--max-timeouts", type=int)
    parser.add_argument("--max-losses", type=int, default=3)
    given = parser.parse_args()
    run, place = given.run, Place.here()
    if not run.is_dir():
        print(f"{run}: the run folder is gone, or this node does not see it", file=sys.stderr)
        return 1
    state = slurm.states([place.job]).get(place.job, "UNKNOWN")
    reason = reason_of(run, place, slurm.seconds_left(place.job), given.margin)
    if state in ("CANCELLED", "COMPLETING") and reason in ("preempted", "lost"):
        reason = "stopped"  # by scancel
    back = comes_back(run, reason, given.max_timeouts, given.max_losses)
    values = {"job": place.job, "restart": place.restart, "reason": reason, "step": newest_step(run)}
    journal.note(run, "ended", **values, requeued=back)
    if reason == "stopped":
        (run / STOP).unlink(missing_ok=True)
    if reason == "failed":
        _say(place, run)
    if not back:
        return 0 if reason in ("finished", "stopped") else max(given.status, 1)
    print(f"{run}: {reason} at step {values['step']}: back into the queue", flush=True)
    try:
        slurm.order("requeue", os.environ["SLURM_JOB_ID"])
    except UserError as error:
        # Slurm has put it back itself, or takes it away
        print(error, file=sys.stderr)
        return given.status
    time.sleep(60)  # until Slurm ends this script: an end of our own might count as the job's
    return 0


def _say(place: Place, run: Path) -> None:
    """The error of the first rank that failed, on top of the others."""
    first, *others = place.reports(run)
    text = f"rank {first['rank']} on {first['node']} failed: {first['error']}\n\n{first['text']}\n"
    for report in others:
        text += f"rank {report['rank']} on {report['node']}: {report['error']}\n"
    (run / "failure.txt").write_text(text)
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
