"""``mmtrain runs sync``: upload what W&B recorded without a network."""

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

#: An offline record of an unfinished run that was written so few seconds ago is taken to be still growing.
_STILL_WRITTEN = 60.0

#: W&B by itself tries for hours, without a word, to reach a server that is not there.
_IMPATIENT = {"WANDB_X_GRAPHQL_RETRY_MAX": "3", "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "5"}


def sync_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, such as runs/vim2_digits.")],
    dry_run: Annotated[bool, typer.Option(help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Upload the offline W&B records of runs: the parts of a run that was restarted become one run."""
    parts: list[Path] = []
    for path in runs:
        run = RunFolder.existing(path)
        # a folder for each process that wrote a record, oldest first
        found = sorted(part for part in (run.path / "wandb").glob("offline-run-*") if any(part.glob("*.wandb")))
        if not found:
            print(f"{path}: no offline W&B records (tracking.wandb=offline makes them)")
        growing = [part for part in found if run.result() is None and _growing(part)]
        for part in growing:
            # what is uploaded once counts as done, and what came later would be left behind
            print(f"{part}: left out, since it is still being written: sync again when the job has ended")
        waiting = [part for part in found if part not in growing and not synced(part)]
        if found and not waiting and not growing:
            print(f"{path}: all {len(found)} offline records are uploaded already")
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
    """Whether W&B marked the record as uploaded."""
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
        raise UserError("there is no W&B key: set WANDB_API_KEY, or call `wandb login`")
    # one call: wandb uploads the parts of a run (those of one id) one after the other, oldest first, and goes on from
    # the last row of the one before
    command = [sys.executable, "-m", "wandb", "sync", *(str(part.resolve()) for part in parts)]
    environment = {**_IMPATIENT, **os.environ, "WANDB_MODE": "online"}
    environment["WANDB_DIR"] = str(parts[0].parent.parent.resolve())  # its logs, else in the current folder
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    left = [part for part in parts if not synced(part)]  # wandb's exit status is 0 when the server refuses a run
    if left:
        said = [line.removeprefix("wandb: ") for line in done.stdout.splitlines() if line.strip()]
        said = [line for line in said if line.startswith("ERROR")] or said
        raise UserError(
            f"{len(left)} of {len(parts)} offline records could not be uploaded:\n  "
            + "\n  ".join(str(part) for part in left)
            + "\nW&B said:\n  "
            + "\n  ".join(said[-10:])
            + "\nThe same command uploads what is left"
        )
