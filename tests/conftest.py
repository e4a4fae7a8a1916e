"""Shared by all tests: few threads, small data, and a way to run the command line as a user does."""

from __future__ import annotations

import logging
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.cli import main

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


#: Tests that share gangs of processes, runs, or what FFCV compiles. They stay on one worker of pytest-xdist.
_TOGETHER = ("tests/parallel/", "tests/inspect/", "tests/data/test_data_ffcv")

#: Groups that take minutes. They start first, so that no worker is left with one of them at the end.
_LONGEST = ("tests/parallel/", "tests/train/test_chaos.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups with slow tests first, and the longest before them."""
    slow = {_group(item.nodeid) for item in items if item.get_closest_marker("slow")}
    order = {name: rank for rank, name in enumerate(_LONGEST)}
    groups = {item: _group(item.nodeid) for item in items}
    items.sort(key=lambda item: (order.get(groups[item], len(order)), groups[item] not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a group to one worker as a whole, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return next((prefix for prefix in _TOGETHER if file.startswith(prefix)), file)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards, 16 × 16 pixels."""
    from mmtrain.data.prepare.demo import prepare_digits

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(out, 16)
    return out


@pytest.fixture(scope="session")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of three noisy daily waves, 600 hours."""
    path = tmp_path_factory.mktemp("series") / "waves.csv"
    hours = np.arange(600)
    noise = np.random.default_rng(0).normal(scale=0.1, size=(600, 3))
    values = np.sin(2 * np.pi * (hours[:, None] / 24 + np.array([0.0, 0.3, 0.6]))) + noise
    stamps = np.datetime64("2026-01-01T00") + hours.astype("timedelta64[h]")
    rows = [",".join([str(t), *(f"{v:.4f}" for v in row)]) for t, row in zip(stamps, values, strict=True)]
    path.write_text("date,a,b,c\n" + "\n".join(rows) + "\n")
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def benchmarks() -> Path:
    """The folder of the public forecasting tables: $MMTRAIN_DATA, or a copy that stands beside the checkout."""
    for folder in (os.environ.get("MMTRAIN_DATA"), ROOT.parent / "shared" / "data" / "forecast"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("the benchmark tables are not here: put ETTh1.csv in a folder and set MMTRAIN_DATA to it")


def cpu_seconds(*words: object) -> float:
    """The seconds of CPU that ``python WORDS`` takes. Other processes lengthen the time on the clock, but not these."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


Cli = Callable[..., Done]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run ``mmtrain …`` (or a script of ``launch/``) in an empty folder, through its own entry point.

    In this process, since starting Python and torch anew takes seconds.
    """

    def call(*arguments: object) -> Done:
        words = [str(a) for a in arguments]
        script = str(ROOT / words.pop(0)) if words[0].endswith(".py") else None
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script or "mmtrain", *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        try:
            runpy.run_path(script, run_name="__main__") if script else main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        said = capsys.readouterr()
        return Done(status, said.out, said.err)

    yield call
    for handler in logging.getLogger("mmtrain").handlers[:]:
        logging.getLogger("mmtrain").removeHandler(handler)
    logging.getLogger("mmtrain").propagate = True
