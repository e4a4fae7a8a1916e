"""Run by the batch script when all tasks of a Slurm job have ended: decides whether the job comes back.

    python -m mmtrain.cluster.requeue RUN STATUS --max-timeouts N --max-losses N

A job that was preempted or came near its time limit is put back into the queue once; so is one that lost a node or a
rank without a word (with --replace-nodes also one whose nodes cannot work together, which are left out), unless that
happens again and again without a new checkpoint. A finished one is not, nor one in which a rank raised an error, nor
one that somebody stopped or cancelled. The decision is taken here, after the tasks, since a requeue from within a task
kills the very process that asks for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.runs import journal, slurm
from mmtrain.runs.folder import newest_step
from mmtrain.runs.journal import JobAttempt

#: A file in the run folder by which a user says that the run shall not come back.
STOP = "stop.request"

#: A job with less time left than its margin and this many seconds left because of its time limit.
_SLACK = 60.0


def end_reason(run: Path, attempt: JobAttempt, seconds_left: float | None, margin: float) -> str:
    """Why the job ended, one of :data:`mmtrain.runs.journal.REASONS`."""
    note = attempt.take_clean_stop(run)
    if (run / "result.json").exists():
        return "finished"
    if (run / STOP).exists():
        return "stopped"
    if bad_nodes(run, attempt):
        return "bad_nodes"
    if any(not report["follows"] for report in attempt.failure_reports(run)):
        return "failed"
    if seconds_left is not None and seconds_left <= margin + _SLACK:
        return "timeout"
    return "preempted" if note is not None else "lost"


def bad_nodes(run: Path, attempt: JobAttempt) -> list[str]:
    """The nodes that the check before the first step found at fault."""
    return sorted({node for report in attempt.failure_reports(run) for node in report.get("bad_nodes", [])})


def should_requeue(
    run: Path, reason: str, max_timeouts: int | None, max_losses: int, replace_nodes: bool = False
) -> bool:
    """Whether a job that ended for ``reason`` is put back into the queue. Prints why not."""
    if reason in ("finished", "stopped", "failed"):
        return False
    ended = [line for line in journal.read(run) if line["kind"] == "ended"]
    if reason == "bad_nodes" and not replace_nodes:
        return False
    if reason == "timeout":
        timeouts = sum(line["reason"] == "timeout" for line in ended)
        if max_timeouts is not None and timeouts >= max_timeouts:
            print(f"{run}: {timeouts} time limits before this one (cluster.max_timeouts): the job does not come back")
            return False
    if reason in ("lost", "bad_nodes"):
        losses, step = 0, newest_step(run)
        for line in reversed(ended):
            if line["reason"] not in ("lost", "bad_nodes") or line["step"] != step:
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
    parser.add_argument("--replace-nodes", action="store_true")
    given = parser.parse_args()
    run, attempt = given.run, JobAttempt.current()
    if not run.is_dir():
        print(f"{run}: the run folder is gone, or this node does not see it", file=sys.stderr)
        return 1
    where = {"job": attempt.job, "restart": attempt.restart, "step": newest_step(run)}
    state = slurm.states([attempt.job]).get(attempt.job, "UNKNOWN")
    reason = end_reason(run, attempt, slurm.seconds_left(attempt.job), given.margin)
    if slurm.restarts(attempt.job) > attempt.restart:  # a lost node, or scontrol requeue
        reason = "preempted" if reason == "lost" else reason
        journal.record(run, "ended", **where, reason=reason, requeued=True)
        return given.status
    if state in ("CANCELLED", "COMPLETING") and reason in ("preempted", "lost"):
        reason = "stopped"  # by scancel
    back = should_requeue(run, reason, given.max_timeouts, given.max_losses, given.replace_nodes)
    journal.record(run, "ended", **where, reason=reason, requeued=back)
    if reason == "stopped":
        (run / STOP).unlink(missing_ok=True)
    if reason in ("failed", "bad_nodes"):
        _say(attempt, run)
    if not back:
        return 0 if reason in ("finished", "stopped") else max(given.status, 1)
    print(f"{run}: {reason} at step {newest_step(run)}: back into the queue", flush=True)
    try:
        slurm.scontrol("requeue", attempt.job)
        if reason == "bad_nodes":
            # Slurm starts the job, which waits, on other nodes than these and those that were left out before
            excluded = [*slurm.excluded(attempt.job), *bad_nodes(run, attempt)]
            slurm.scontrol("update", f"jobid={attempt.job}", "excnodelist=" + ",".join(excluded))
    except UserError as error:
        # Slurm has put it back itself, or takes it away
        print(error, file=sys.stderr)
        return given.status
    time.sleep(60)  # until Slurm ends this script: an end of our own might count as the job's
    return 0


def _say(attempt: JobAttempt, run: Path) -> None:
    """The error of the first rank that failed, on top of the others."""
    first, *others = attempt.failure_reports(run)
    text = f"rank {first['rank']} on {first['node']} failed: {first['error']}\n\n{first['text']}\n"
    for report in others:
        text += f"rank {report['rank']} on {report['node']}: {report['error']}\n"
    (run / "failure.txt").write_text(text)
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
