"""The commands of ``mmtrain``, and how a command's errors reach the user."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from mmtrain.cli.common import lazy_app
from mmtrain.errors import LostConnection, SharedError, UserError
from mmtrain.log import log_to_console
from mmtrain.version import __version__

#: Errors of the system whose cause is a path, a permission or a disk: they become a message, whoever meets them.
_USERS = {
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmtrain {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


app = lazy_app(
    "mmtrain",
    "Train and use MambaMixer models: ViM2 for images, TSM2 for time series.",
    {
        "train": ("mmtrain.cli.train:train_command", "Train in this process, or as one rank of torchrun or Slurm."),
        "submit": ("mmtrain.cli.submit:submit_command", "Train on Slurm, in several processes here, or in front."),
        "configs": ("mmtrain.cli.train:configs_command", "List the configurations that --config takes by name."),
        "runs": ("mmtrain.cli.runs:app", "List the runs with their state and results, watch, stop and read them."),
        "report": ("mmtrain.cli.runs:report_command", "Write one HTML file about one or several runs."),
        "predict": ("mmtrain.cli.trained:predict_command", "Classify images, or forecast a series."),
        "eval": ("mmtrain.cli.trained:eval_command", "Measure a trained run on a whole split of its data."),
        "export": ("mmtrain.cli.trained:export_command", "Write a trained model as safetensors, ONNX or a program."),
        "model": ("mmtrain.cli.model:model_command", "Show a model's parameters and FLOPs, and what it selects."),
        "plan": ("mmtrain.cli.model:plan_command", "Plan a run: memory, traffic, step time and GPU-hours."),
        "data": ("mmtrain.cli.data:app", "Fetch, prepare and look at datasets; index shards."),
        "doctor": ("mmtrain.cli.doctor:doctor_command", "Say what this machine and installation offer."),
    },
    callback=_options,
)


def main() -> None:
    """Run ``mmtrain``."""
    run_app(app)


def run_app(app: Callable[[], object]) -> None:
    """Run an application; the user's errors become one message.

    Exit status: 2 for bad input, 1 after another rank was lost, 130 or 143 after a signal asked a run to save and stop.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows a character as its code
            stream.reconfigure(errors="backslashreplace")
    try:
        log_to_console()
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk is noticed here, not while the interpreter ends
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        rank = rank if rank.isdecimal() else "0"
        if rank == "0":
            print(f"error: {_shortened(str(error))}", file=sys.stderr)
        elif not isinstance(error, SharedError):
            print(f"[rank {rank}] error: {_shortened(str(error))}", file=sys.stderr)
        sys.exit(2)
    except LostConnection as error:
        print(f"error: {_shortened(str(error))}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(1)
    except OSError as error:
        if error.errno not in _USERS:
            raise
        _discard_stdout()
        name = _shortened(str(error.filename or "the output"))
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _open_closed_streams() -> None:
    """Give standard streams that the caller has closed (``2>&-``) to the null device.

    Python has none of them then, and the next file that is opened would get the number of the closed one, and with it
    whatever libraries write there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - for good


def _shortened(message: str) -> str:
    """``message`` with words of thousands of characters cut."""
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}... ({len(word[0])} characters)", message)


def _discard_stdout() -> None:
    """Let the interpreter end without another attempt to write what standard output did not take."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
