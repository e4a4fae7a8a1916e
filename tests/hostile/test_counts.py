"""Numbers of threads and processes that no machine can run are refused before anything is started or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.config import load_config
from mmtrain.data.core.counts import set_threads
from mmtrain.data.core.loader import eval_batches, train_batches
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.data.prepare.pool import run_jobs
from mmtrain.errors import UserError
from mmtrain.train.session import train

SOURCE = SyntheticImages(3, 8, 16, seed=0)
CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: set_threads(100_000), "threads=100000: the limit on this machine is"),
    (lambda: set_threads(2**40), "threads=1099511627776: the limit on this machine is"),
    (
        lambda: list(eval_batches(SOURCE, batch_size=4, workers=100_000)),
        "data.workers=100000: the limit on this machine is",
    ),
    (lambda: train_batches(SOURCE, seed=0, batch_size=4, start=0, steps=1, workers=-1), "data.workers=-1"),
    (lambda: list(run_jobs(abs, [1, 2], 100_000, ordered=True)), "--workers 100000: the limit on this machine is"),
    (lambda: list(run_jobs(abs, [1, 2], -1, ordered=True)), "--workers -1: must be a number of processes"),
]


@pytest.mark.parametrize(("call", "said"), CASES, ids=[said for _, said in CASES])
def test_too_many_are_refused(call: Callable[[], Any], said: str) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        call()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("key", ["threads", "data.workers"])
def test_a_run_leaves_nothing_behind(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{key}(=| is )100000"):
        train(load_config("vim2_digits", ["data=synthetic", f"{key}=100000"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_usual_numbers_are_taken() -> None:
    before = torch.get_num_threads()
    set_threads(None)
    set_threads(before)
    assert torch.get_num_threads() == before
    assert sum(len(batch["index"]) for batch in eval_batches(SOURCE, batch_size=4)) == len(SOURCE)
    assert list(run_jobs(np.abs, [-1, 2], 0, ordered=True)) == [1, 2]
