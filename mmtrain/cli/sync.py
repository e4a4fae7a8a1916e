"""``mmtrain runs sync``: upload offline W&B records."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mmtrain.errors import UserError
from mmtrain.runs.folder import RunFolder

#: A record of an unfinished run counts as still being written if it changed within this many seconds.
_STILL_WRITTEN = 60.0

#: Few retries: by default W&B silently tries for hours to reach a server that does not answer.
_FEW_RETRIES = {"WANDB_X_GRAPHQL_RETRY_MAX": "3", "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "5"}


def sync_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, such as runs/vim2_digits.")],
    dry_run: Annotated[bool, typer.Option(help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Upload the offline W&B records of runs. All records of a restarted run are uploaded to one W&B run.

    \b
    Examples:
      mmtrain runs sync runs/my_run --dry-run    # list the records
      mmtrain runs sync runs/my_run
    """
    parts: list[Path] = []
    for path in runs:
        run = RunFolder.existing(path)
        # one folder for each start of the run, oldest first
        found = sorted(part for part in (run.path / "wandb").glob("offline-run-*") if any(part.glob("*.wandb")))
        if not found:
            print(f"{path}: no offline W&B records (tracking.wandb=offline writes them)")
        growing = [part for part in found if run.result() is None and _growing(part)]
        for part in growing:
            # W&B uploads a record only once: rows written afterwards would be lost
            print(f"{part}: skipped, because it is still being written. Sync again when the job has ended")
        waiting = [part for part in found if part not in growing and not synced(part)]
        if found and not waiting and not growing:
            print(f"{path}: all {len(found)} offline records have already been uploaded")
        parts += waiting
    if dry_run:
        for part in parts:
            print(f"would upload {part} to the W&B run {part.name.rsplit('-', 1)[1]}")
        return
    if parts:
        print(f"uploading {len(parts)} offline record{'s' if len(parts) > 1 else ''}")
        _upload(parts)
        print("uploaded")


def synced(part: Path) -> bool:
    """Return whether W&B has marked the record as uploaded."""
    return any(part.glob("*.wandb.synced"))


def _growing(part: Path) -> bool:
    return any(time.time() - file.stat().st_mtime < _STILL_WRITTEN for file in part.glob("*.wandb"))


def _upload(parts: list[Path]) -> None:
    try:
        from mmtrain.train.trackers.sinks import has_wandb_key

        key = has_wandb_key()
    except ImportError:
        raise UserError("wandb is not installed: pip install 'mmtrain[wandb]'") from None
    if not key:
        raise UserError("no W&B key found: set WANDB_API_KEY, or call `wandb login`")
    # one call for all: wandb uploads the records with the same run id in order, and appends each to the one before
    command = [sys.executable, "-m", "wandb", "sync", *(str(part.resolve()) for part in parts)]
    environment = {**_FEW_RETRIES, **os.environ, "WANDB_MODE": "online"}
    environment["WANDB_DIR"] = str(parts[0].parent.parent.resolve())  # for its logs; the default is the current folder
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    left = [part for part in parts if not synced(part)]  # wandb's exit status is 0 when the server refuses a run
    if left:
        output = [line.removeprefix("wandb: ") for line in done.stdout.splitlines() if line.strip()]
        output = [line for line in output if line.startswith("ERROR")] or output
        raise UserError(
            f"{len(left)} of {len(parts)} offline records could not be uploaded:\n  "
            + "\n  ".join(str(part) for part in left)
            + "\nOutput of wandb:\n  "
            + "\n  ".join(output[-10:])
            + "\nRun the same command again to upload the rest"
        )
