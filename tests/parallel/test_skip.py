"""A step that is not finite on one rank is left out on all, whatever holds the gradients."""

from __future__ import annotations

import json

import pytest

from tests.parallel.cases import Case, strategies
from tests.parallel.jobs import sick
from tests.parallel.results import lines, same_weights
from tests.parallel.runs import Runs

pytestmark = pytest.mark.slow

_SHORT = ("train.max_steps", 5)
_SICK = [
    Case("tsm2", strategy, 2, (_SHORT, ("train.accumulation", parts))) for parts in (1, 2) for strategy in strategies(2)
]

_SICK += [Case("tsm2", f"zero{stage}", 2, (_SHORT, ("parallel.offload", True))) for stage in (2, 3)]


@pytest.mark.parametrize("case", _SICK, ids=str)
def test_a_step_that_is_not_finite_leaves_no_trace(case: Case, runs: Runs) -> None:
    (_, folder), (_, reference) = (runs.do(sick, c, "sick") for c in (case, case.alone))
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 1
    losses, expected = ([line["loss"] for line in lines(f, "train")] for f in (folder, reference))
    assert losses == pytest.approx(expected, rel=1e-5, nan_ok=True)
    same_weights(folder, reference, step=5)
