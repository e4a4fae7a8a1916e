"""Activation checkpointing and torch.compile change what a step costs and not what it computes, under any strategy."""

from __future__ import annotations

import pytest

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.parallel.build import check_strategy
from tests.parallel.cases import Case
from tests.parallel.conftest import HAS_DEEPSPEED
from tests.parallel.results import at, same_losses, tensors
from tests.parallel.runs import Runs


def _short(model: str, strategy: str, world: int, key: str, value: object) -> Case:
    return Case(model, strategy, world, (("train.max_steps", 5), (key, value)))


_HOW = [
    *[
        (mode, *how)
        for mode in ("full", "selective")
        for how in (("vim2", "none", 1), ("vim2", "fsdp", 2), ("tsm2", "fsdp", 2))
    ],
    ("full", "tsm2", "zero3", 2),
    ("selective", "tsm2", "zero2", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [_short(model, s, world, "train.checkpointing", mode) for mode, model, s, world in _HOW], ids=str
)
def test_recomputed_activations_give_the_same_losses(case: Case, runs: Runs) -> None:
    same_losses(runs.of(case), runs.of(case.alone))
    found, expected = (tensors(at(runs.of(c), 5))["model"] for c in (case, case.alone))
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [_short("tsm2", strategy, world, "train.compile", True) for strategy, world in (("none", 1), ("fsdp", 2))],
    ids=str,
)
def test_compiled_blocks_give_the_same_losses(case: Case, runs: Runs) -> None:
    same_losses(runs.of(case), runs.of(case.alone))


def test_zero3_refuses_to_recompute_selectively() -> None:
    """torch counts the operations of a region, and DeepSpeed's gathers come in another number the second time."""
    config = RunConfig()
    config.parallel.strategy, config.train.checkpointing = "zero3", "selective"
    with pytest.raises(
        UserError, match="Use train.checkpointing=full or parallel.strategy=fsdp" if HAS_DEEPSPEED else "DeepSpeed"
    ):
        check_strategy(config, 2)
