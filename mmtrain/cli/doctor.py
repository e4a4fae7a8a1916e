"""``mmtrain doctor``: show what is installed, what is missing, and how to install it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import typer

from mmtrain.cluster.task import torch_variables
from mmtrain.ops import backend_report
from mmtrain.parallel.preflight import check_ranks
from mmtrain.parallel.ranks import init_distributed
from mmtrain.version import __version__

#: Maps each optional package to its purpose and to the way to install it.
_OPTIONAL = {
    "mamba-ssm": ("CUDA scan kernels", "see docs/install.md (requires CUDA and nvcc)"),
    "triton": ("mmtrain's GPU kernels", "included in the CUDA build of torch"),
    "wandb": ("experiment tracking", "pip install 'mmtrain[wandb]'"),
    "scikit-learn": ("digits of the demo", "pip install 'mmtrain[demo]'"),
    "AutoTS": ("series of the demo", "pip install 'mmtrain[demo]'"),
    "deepspeed": ("parallel.strategy=zero1, zero2, zero3", "pip install 'mmtrain[deepspeed]'"),
    "ffcv": ("data.kind=ffcv", "pip install 'mmtrain[ffcv]' (requires OpenCV and libturbojpeg)"),
}


def doctor_command(
    scan: bool = typer.Option(True, help="Load the scan kernel and show which backend is used."),
    ranks: bool = typer.Option(False, help="Check that the tasks of srun or torchrun can work together."),
    run_dir: str = typer.Option("runs", help="With --ranks: folder that all nodes must share."),
) -> None:
    """Show what this machine and installation support, and what would make training faster.

    \b
    Examples:
      mmtrain doctor
      srun --ntasks-per-node=8 mmtrain doctor --ranks    # inside a Slurm allocation
    """
    if ranks:
        _check_ranks(Path(run_dir))
        return
    _line("mmtrain", __version__)
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    _line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs")
    cuda = torch.cuda.is_available()
    _line("cuda", torch.cuda.get_device_name() if cuda else "none (models run on the CPU)")
    if scan:
        for key, value in backend_report().items():
            _line(f"scan {key}", str(value))
    for name, (purpose, cure) in _OPTIONAL.items():
        try:
            _line(name, f"{version(name)} ({purpose})")
        except PackageNotFoundError:
            _line(name, f"missing ({purpose}): {cure}")
    _line("slurm", shutil.which("sbatch") or "no sbatch found: use --local or --debug")
    _line("g++", shutil.which(os.environ.get("CXX", "g++")) or "missing: apt install g++ (it compiles the CPU kernels)")
    if importlib.util.find_spec("wandb") and not os.environ.get("WANDB_API_KEY"):
        _line("W&B key", "WANDB_API_KEY is not set; tracking.wandb=offline needs no key")


def _check_ranks(folder: Path) -> None:
    """Run the checks that a job makes before its first step (``srun mmtrain doctor --ranks``)."""
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        os.environ.update(torch_variables(os.environ))
    with init_distributed(timeout=120.0) as here:
        seen = check_ranks(here, folder, "auto")
        if here.main:
            print(f"{seen}: every rank has its device, {folder} is shared, clocks agree, all-reduce is correct")


def _line(name: str, text: str) -> None:
    print(f"{name:<16} {text}")
