"""Every strategy on every number of ranks learns what one process learns, with all randomness, clipping and average."""

from __future__ import annotations

import pytest

from tests.parallel.cases import Case, matrix
from tests.parallel.results import lines, losses, same_losses, same_weights
from tests.parallel.runs import Runs

pytestmark = pytest.mark.slow

PLAIN = [*matrix("tsm2"), *matrix("vim2")]
# every strategy with 2 and with 4 micro-batches, in one process and in several; Mixup and drop path under three of them
ACCUMULATED = [
    *[case for parts in (2, 4) for case in matrix("tsm2", (1,), ("train.accumulation", parts))],
    *matrix("tsm2", (2,), ("train.accumulation", 4)),
    *matrix("tsm2", (4,), ("train.accumulation", 2)),
    *[Case("vim2", "none", 1, (("train.accumulation", parts),)) for parts in (2, 4)],
    *[Case("vim2", strategy, 2, (("train.accumulation", 4),)) for strategy in ("ddp", "fsdp", "zero2")],
]
_OFFLOAD = ("parallel.offload", True)
OFFLOADED = [Case("tsm2", f"zero{stage}", 2, (_OFFLOAD, ("train.accumulation", 2))) for stage in (1, 2, 3)]
BF16 = [
    Case(model, strategy, world, (("train.precision", "bf16"),))
    for model in ("tsm2", "vim2")
    for strategy, world in (("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 4), ("zero3", 2))
]


@pytest.mark.parametrize("case", [*PLAIN, *ACCUMULATED, *OFFLOADED], ids=str)
def test_learns_what_one_process_learns(case: Case, runs: Runs) -> None:
    folder, reference = runs.of(case), runs.of(case.alone)
    same_losses(folder, reference)
    same_weights(folder, reference)
    norms, expected = ([line["grad_norm"] for line in lines(f, "train")] for f in (folder, reference))
    assert norms == pytest.approx(expected, rel=1e-4)
    limit = runs.bases[case.model].optim.clip_norm
    assert limit is not None
    assert min(norms) > limit  # the clipping was at work in every step


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_stays_within_its_rounding(case: Case, runs: Runs) -> None:
    """bf16 rounds to 1 in 256; each piece of a batch has its gradients rounded on its own."""
    folder, reference = runs.of(case), runs.of(case.alone)
    same_losses(folder, reference, rel=1 / 256)
    exact = runs.of(Case(case.model))
    assert losses(folder) == pytest.approx(losses(exact), rel=4 / 256)
    assert losses(folder) != pytest.approx(losses(exact), rel=1e-5)  # it was bf16
