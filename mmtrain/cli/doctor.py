"""``mmtrain doctor``: what is there, what is missing, and the command that would make it better."""

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

# what each optional package is for, and how to get it
_OPTIONAL = {
    "mamba-ssm": ("CUDA scan kernels", "docs/install.md has the commands (they need CUDA and nvcc)"),
    "triton": ("GPU kernels of ours", "comes with the CUDA build of torch"),
    "wandb": ("experiment tracking", "pip install 'mmtrain[wandb]'"),
    "scikit-learn": ("the demo's digits", "pip install 'mmtrain[demo]'"),
    "AutoTS": ("the demo's series", "pip install 'mmtrain[demo]'"),
    "deepspeed": ("parallel.strategy=zero1, zero2, zero3", "pip install 'mmtrain[deepspeed]'"),
    "ffcv": ("data.kind=ffcv", "pip install 'mmtrain[ffcv]' (it needs OpenCV and libturbojpeg)"),
}


def doctor_command(
    scan: bool = typer.Option(True, help="Load the scan kernel and say which backend runs."),
    ranks: bool = typer.Option(False, help="As each task of srun or torchrun: see that they can work together."),
    run_dir: str = typer.Option("runs", help="With --ranks: a folder that all nodes must share."),
) -> None:
    """Say what this machine and installation offer, and what would make them faster."""
    if ranks:
        _check_ranks(Path(run_dir))
        return
    _line("mmtrain", __version__)
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    _line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs")
    cuda = torch.cuda.is_available()
    _line("cuda", torch.cuda.get_device_name() if cuda else "none: models run on the CPU")
    if scan:
        for key, value in backend_report().items():
            _line(f"scan {key}", str(value))
    for name, (purpose, cure) in _OPTIONAL.items():
        try:
            _line(name, f"{version(name)} ({purpose})")
        except PackageNotFoundError:
            _line(name, f"missing ({purpose}): {cure}")
    _line("slurm", shutil.which("sbatch") or "no sbatch here: use --local or --debug")
    _line("g++", shutil.which(os.environ.get("CXX", "g++")) or "missing: apt install g++ (builds the CPU scan kernel)")
    if importlib.util.find_spec("wandb") and not os.environ.get("WANDB_API_KEY"):
        _line("W&B key", "WANDB_API_KEY is not set: tracking.wandb=offline works without")


def _check_ranks(folder: Path) -> None:
    """``srun mmtrain doctor --ranks``: the checks that a job makes before its first step, on their own."""
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        os.environ.update(torch_variables(os.environ))
    with init_distributed(timeout=120.0) as here:
        seen = check_ranks(here, folder, "auto")
        if here.main:
            print(f"{seen}: each sees its device, {folder} is shared, clocks agree, a reduction adds up")


def _line(name: str, text: str) -> None:
    print(f"{name:<16} {text}")
