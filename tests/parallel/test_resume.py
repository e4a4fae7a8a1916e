"""A checkpoint of any strategy goes on under any other, on any number of ranks, as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.parallel.cases import HALF, WORLDS, Case, strategies
from tests.parallel.jobs import LOADED, forgetful
from tests.parallel.results import at, losses, same_bits, same_losses, same_moments, same_weights, tensors
from tests.parallel.runs import Runs, after

pytestmark = pytest.mark.slow

SAVED = [("ddp", 2), ("fsdp", 4), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
LOADS = [after(Case("tsm2", *saved), s, world) for saved in SAVED for world in WORLDS for s in strategies(world)]
# some changes of hands with the other model, whose tensors have other shapes
LOADS += [
    after(Case("vim2", *saved), *loaded)
    for saved, loaded in (
        (("ddp", 2), ("zero2", 4)),
        (("fsdp", 4), ("zero3", 2)),
        (("hsdp", 4), ("none", 1)),
        (("zero2", 2), ("hsdp", 4)),
        (("zero3", 2), ("fsdp", 4)),
    )
]


@pytest.mark.parametrize("case", LOADS, ids=str)
def test_goes_on_as_the_unbroken_run_does(case: Case, runs: Runs) -> None:
    assert case.start is not None
    folder, whole = runs.of(case), runs.of(case.start)
    # what was loaded, saved again at once: to the bit
    same_bits(tensors(folder / LOADED), tensors(at(whole, HALF)))
    assert len(losses(folder, HALF)) == 10
    same_losses(folder, whole, HALF)
    same_weights(folder, whole)
    same_moments(folder, whole)


def test_lost_moments_would_be_noticed(runs: Runs) -> None:
    start = Case("tsm2", "ddp", 2)
    _, folder = runs.do(forgetful, after(start, "fsdp", 2), "forgetful")
    with pytest.raises(AssertionError):
        same_losses(folder, runs.of(start), HALF, rel=1e-3)  # a hundred times the tolerance
    with pytest.raises(AssertionError):
        same_moments(folder, runs.of(start))
