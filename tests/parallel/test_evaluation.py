"""Evaluations whose split the ranks do not divide, and what is exported from a model that was split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.cases import STEPS, Case
from tests.parallel.results import at, lines, same_losses, tensors
from tests.parallel.runs import Runs

pytestmark = pytest.mark.slow


def _short(strategy: str, world: int, samples: int) -> Case:
    changes = (("data.val_length", samples), ("eval.batch_size", 10), ("train.max_steps", 2))
    return Case("made_up", strategy, world, changes)


# on 4 ranks, in batches of 10: 97 are 25 + 24 + 24 + 24, in 3 batches each; of 81 only rank 0 has a third batch; of 3
# rank 3 has none
_SPLITS = [
    *[_short(strategy, 4, 97) for strategy in ("fsdp", "zero3")],
    *[_short(strategy, 4, 81) for strategy in ("ddp", "fsdp", "hsdp", "zero2", "zero3")],
    *[_short(strategy, 4, 3) for strategy in ("ddp", "fsdp", "zero3")],
]


@pytest.mark.parametrize("case", _SPLITS, ids=str)
def test_every_sample_counts_once(case: Case, runs: Runs) -> None:
    folder, reference = runs.of(case), runs.of(case.alone)
    same_losses(folder, reference)
    found, expected = (lines(f, "eval")[-1] for f in (folder, reference))
    assert found["samples"] == dict(case.changes)["data.val_length"]
    assert found["top1"] == expected["top1"]


@pytest.mark.parametrize("case", [Case("vim2", "fsdp", 2), Case("vim2", "zero3", 2), Case("tsm2", "zero3", 2)], ids=str)
def test_an_export_is_the_checkpoint(case: Case, runs: Runs, cli: Callable, tmp_path: Path) -> None:
    """In a process of its own, which knows nothing of the strategy."""
    folder = runs.of(case)
    for which, step in (("best", json.loads((folder / "result.json").read_text())["tested_step"]), ("last", STEPS)):
        if which == "best":
            step = json.loads((at(folder) / "state.json").read_text())["best_step"]
        out = tmp_path / which
        done = cli("export", folder, "--out", out, "--checkpoint", which)
        assert done.returncode == 0, done.stderr
        exported, average = load_file(out / "model.safetensors"), tensors(at(folder, step))["average"]
        assert exported.keys() == average.keys()
        assert all(torch.equal(exported[name], average[name]) for name in average)
