"""Run on this machine: in this process, or in several under torchrun."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from mmtrain.config import RunConfig, to_yaml
from mmtrain.errors import UserError
from mmtrain.train.session import run_path


def run_here(config: RunConfig, run_dir: str | None, *, debug: bool, dry_run: bool) -> None:
    """Train in this process, in the foreground."""
    if dry_run:
        _say(config, run_dir, "in this process" + (", two steps of a shrunken model" if debug else ""))
        return
    from mmtrain.cli.train import run_training

    run_training(config, run_dir, debug=debug)


def run_local(
    config: RunConfig,
    processes: int,
    config_name: str,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    dry_run: bool,
) -> None:
    """Train in ``processes`` processes on this machine; one is this process itself.

    Raises:
        UserError: for a number of processes that makes no sense.
    """
    if processes < 1:
        raise UserError(f"--local {processes}: give the number of processes, at least 1")
    if processes == 1:
        run_here(config, run_dir, debug=False, dry_run=dry_run)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--module", "mmtrain", "train", "--config", config_name, *overrides]
    command += ["--run-dir", run_dir] if run_dir else []
    if dry_run:
        _say(config, run_dir, "as: " + " ".join(command))
        return
    assert importlib.util.find_spec("mmtrain") is not None
    sys.exit(subprocess.run(command, check=False).returncode)


def _say(config: RunConfig, run_dir: str | None, how: str) -> None:
    print(f"run folder: {run_path(config, run_dir)}\nwould train {how}\n\n{to_yaml(config)}", end="")
