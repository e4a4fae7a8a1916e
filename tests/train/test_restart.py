"""A killed run ends in the same bits also with deterministic algorithms, and where a task draws random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import same_end
from faults import All, GlobalNoise, Kill
from ranks_apart import Fault, run_ranks

OPTIONS = ("train.max_steps=10", "eval.every_steps=5", "checkpoint.every_steps=3", "train.ema_decay=0.9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "option"),
    [(None, "train.deterministic=true"), (GlobalNoise(), "train.accumulation=2")],
    ids=["deterministic algorithms", "the global generators"],
)
def test_a_killed_run_ends_in_the_same_bits(series: Path, tmp_path: Path, fault: Fault | None, option: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    also = (fault,) if fault else ()
    ended = run_ranks(series, whole, *OPTIONS, option, fault=All(also))
    assert [rank.status for rank in ended] == [0, 0], ended
    ended = run_ranks(series, killed, *OPTIONS, option, fault=All((*also, Kill(0, step=7))))
    assert ended[0].status == -9, ended
    ended = run_ranks(series, killed, *OPTIONS, option, fault=All(also))
    assert [rank.status for rank in ended] == [0, 0], ended
    assert "resuming at step" in ended[0].said
    assert same_end(whole, killed)
