"""The commands of ``mmtrain``, and the conversion of their errors into messages and exit statuses."""

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

#: System errors caused by a path, a permission or a disk. The user gets a message instead of a traceback.
_USER_ERRORS = {
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


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mmtrain {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


app = lazy_app(
    "mmtrain",
    """Train and use MambaMixer models: ViM2 for images, TSM2 for time series.

    \b
    Examples:
      mmtrain configs                                          # list the configurations
      mmtrain submit --config vim2_digits --local 1            # train on this machine
      mmtrain submit --config vim2_base_in1k --nodes 4         # train on Slurm
      mmtrain submit --resume runs/vim2_base_in1k --nodes 2    # resume, on fewer nodes
      mmtrain runs                                             # list the runs with their results
      mmtrain report runs/vim2_digits                          # write an HTML report of a run
      mmtrain eval runs/vim2_digits --split val                # evaluate a trained model
      mmtrain predict runs/vim2_digits digit.png               # classify an image
      mmtrain export runs/vim2_digits --out exported           # write weights and configuration
      mmtrain doctor                                           # check this installation
    """,
    {
        "train": ("mmtrain.cli.train:train_command", "Train in this process, or as one rank of torchrun or Slurm."),
        "submit": ("mmtrain.cli.submit:submit_command", "Start or resume a run on Slurm or on this machine."),
        "configs": ("mmtrain.cli.train:configs_command", "List the configurations that --config takes by name."),
        "runs": ("mmtrain.cli.runs:app", "List, watch and stop runs, and read their logs."),
        "report": ("mmtrain.cli.runs:report_command", "Write an HTML report of one or several runs."),
        "predict": ("mmtrain.cli.trained:predict_command", "Classify images or forecast series."),
        "eval": ("mmtrain.cli.trained:eval_command", "Evaluate a trained model on the val or test split."),
        "export": ("mmtrain.cli.trained:export_command", "Export a trained model (safetensors, ONNX or torch)."),
        "model": ("mmtrain.cli.model:model_command", "Show a model's parameters, FLOPs and learned selection."),
        "plan": ("mmtrain.cli.model:plan_command", "Estimate memory, traffic, step time and GPU-hours of a run."),
        "data": ("mmtrain.cli.data:app", "Download, prepare, index and describe data sets."),
        "doctor": ("mmtrain.cli.doctor:doctor_command", "Show what this machine and installation support."),
    },
    callback=_options,
)


def main() -> None:
    """Run ``mmtrain``."""
    run_app(app)


def run_app(app: Callable[[], object]) -> None:
    """Run an application and turn expected errors into one message on standard error.

    The exit status is 2 for bad input, 1 after another rank was lost, and 130 or 143 after a signal made a run save and
    stop.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print characters that the encoding lacks as escape codes
            stream.reconfigure(errors="backslashreplace")
    try:
        log_to_console()
        try:
            app()
        finally:
            sys.stdout.flush()  # report a full disk here, not during interpreter shutdown
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
        if error.errno not in _USER_ERRORS:
            raise
        _discard_stdout()
        name = _shortened(str(error.filename or "the output"))
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _open_closed_streams() -> None:
    """Connect standard streams that the caller has closed (``2>&-``) to the null device.

    Otherwise the next opened file would get the descriptor of the closed stream, and libraries would write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - stays open


def _shortened(message: str) -> str:
    """Return ``message`` with very long words cut."""
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}... ({len(word[0])} characters)", message)


def _discard_stdout() -> None:
    """Redirect standard output to the null device, so that the interpreter does not flush it again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
