"""Decision whether to requeue a Slurm job. The batch script runs it when all tasks of the job have ended.

    python -m mmtrain.cluster.requeue RUN STATUS --max-timeouts N --max-losses N

A job is requeued if it was preempted, reached its time limit, or lost a node or a rank. With --replace-nodes it is also
requeued, on other nodes, if its nodes cannot work together. It is not requeued if it finished, a rank raised an error,
a user stopped or cancelled it, or it lost ranks repeatedly without a new checkpoint. The decision is made after the
tasks have ended, because a requeue from within a task would kill the process that requests it.
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

#: File in the run folder with which a user requests that the run is not requeued.
STOP = "stop.request"

#: A job counts as ended by its time limit if less than its margin plus this many seconds were left.
_SLACK = 60.0


def end_reason(run: Path, attempt: JobAttempt, seconds_left: float | None, margin: float) -> str:
    """Return why the job ended: one of :data:`mmtrain.runs.journal.REASONS`.

    Args:
        run: The run folder.
        attempt: The job and its number of restarts.
        seconds_left: Seconds until the time limit, or None if unknown.
        margin: ``cluster.margin`` in seconds.
    """
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
    """Return the nodes that failed the check before the first step."""
    return sorted({node for report in attempt.failure_reports(run) for node in report.get("bad_nodes", [])})


def should_requeue(
    run: Path, reason: str, max_timeouts: int | None, max_losses: int, replace_nodes: bool = False
) -> bool:
    """Return whether to requeue a job that ended for ``reason``. Print a message if a limit prevents it."""
    if reason in ("finished", "stopped", "failed"):
        return False
    ended = [line for line in journal.read(run) if line["kind"] == "ended"]
    if reason == "bad_nodes" and not replace_nodes:
        return False
    if reason == "timeout":
        timeouts = sum(line["reason"] == "timeout" for line in ended)
        if max_timeouts is not None and timeouts >= max_timeouts:
            print(f"{run}: not requeued: {timeouts} earlier jobs reached their time limit (cluster.max_timeouts)")
            return False
    if reason in ("lost", "bad_nodes"):
        losses, step = 0, newest_step(run)
        for line in reversed(ended):
            if line["reason"] not in ("lost", "bad_nodes") or line["step"] != step:
                break
            losses += 1
        if losses >= max_losses:
            print(
                f"{run}: not requeued: a rank or node was lost {losses + 1} times in a row without a new checkpoint"
                " (cluster.max_losses). Read the logs of the ranks with mmtrain runs logs"
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
        print(f"{run}: the run folder was deleted, or this node cannot see it", file=sys.stderr)
        return 1
    where = {"job": attempt.job, "restart": attempt.restart, "step": newest_step(run)}
    state = slurm.states([attempt.job]).get(attempt.job, "UNKNOWN")
    reason = end_reason(run, attempt, slurm.seconds_left(attempt.job), given.margin)
    if slurm.restarts(attempt.job) > attempt.restart:  # Slurm has already requeued it: lost node or scontrol requeue
        reason = "preempted" if reason == "lost" else reason
        journal.record(run, "ended", **where, reason=reason, requeued=True)
        return given.status
    if state in ("CANCELLED", "COMPLETING") and reason in ("preempted", "lost"):
        reason = "stopped"  # by scancel
    requeued = should_requeue(run, reason, given.max_timeouts, given.max_losses, given.replace_nodes)
    journal.record(run, "ended", **where, reason=reason, requeued=requeued)
    if reason == "stopped":
        (run / STOP).unlink(missing_ok=True)
    if reason in ("failed", "bad_nodes"):
        _report_failure(attempt, run)
    if not requeued:
        return 0 if reason in ("finished", "stopped") else max(given.status, 1)
    print(f"{run}: {reason} at step {newest_step(run)}: requeueing the job", flush=True)
    try:
        slurm.scontrol("requeue", attempt.job)
        if reason == "bad_nodes":
            # the requeued job waits, so its excluded nodes can still be changed; keep those excluded earlier
            excluded = [*slurm.excluded(attempt.job), *bad_nodes(run, attempt)]
            slurm.scontrol("update", f"jobid={attempt.job}", "excnodelist=" + ",".join(excluded))
    except UserError as error:
        # Slurm has already requeued or cancelled the job itself
        print(error, file=sys.stderr)
        return given.status
    time.sleep(60)  # until Slurm ends this script: if it ended itself, Slurm might count the job as completed
    return 0


def _report_failure(attempt: JobAttempt, run: Path) -> None:
    """Write failure.txt: the error of the first rank that failed with its traceback, then the errors of the others."""
    first, *others = attempt.failure_reports(run)
    text = f"rank {first['rank']} on {first['node']} failed: {first['error']}\n\n{first['text']}\n"
    for report in others:
        text += f"rank {report['rank']} on {report['node']}: {report['error']}\n"
    (run / "failure.txt").write_text(text)
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
