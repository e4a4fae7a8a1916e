"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run ``mmtrain``; the user's errors become one message and exit status 2."""
    from mmtrain.cli.app import app

    run_app(app)


def run_app(app: object) -> None:
    """Run a typer application with the project's error handling.

    Exit status: 2 for bad input, 130 or 143 after a signal asked a run to save and stop.
    """
    from mmtrain.errors import SharedError, UserError
    from mmtrain.log import log_to_console

    log_to_console()
    try:
        app()  # type: ignore[operator]
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, SharedError):
            print(f"[rank {rank}] error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
