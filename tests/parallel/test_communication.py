"""Gradients are reduced once a step, however many micro-batches it has."""

from __future__ import annotations

import pytest

from tests.parallel.cases import Case
from tests.parallel.jobs import collectives
from tests.parallel.runs import Runs

pytestmark = pytest.mark.slow

#: The operations that add gradients up. Gathers of split parameters do come once a micro-batch.
_REDUCTIONS = ("gloo:all_reduce", "gloo:reduce", "gloo:reduce_scatter", "direct::reduce_scatter")


@pytest.mark.parametrize(
    "case",
    [Case("tsm2", s, w) for s, w in (("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2))],
    ids=str,
)
def test_accumulation_adds_no_reduction(case: Case, runs: Runs) -> None:
    counts = []
    for parts in (1, 4):
        changes = (("train.max_steps", 1), ("train.accumulation", parts))
        by_rank, _ = runs.do(collectives, Case(case.model, case.strategy, case.world, changes), "counted")
        counts.append({name: n for name, n in by_rank[0].items() if name.startswith(_REDUCTIONS)})
    assert sum(counts[0].values()) > 0
    assert counts[0] == counts[1]
