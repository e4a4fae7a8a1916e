"""How the global batch falls on ranks and micro-batches, and what to say where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.config import RunConfig


@dataclass(frozen=True)
class BatchCut:
    """``samples`` a rank and micro-batch, ``micros`` micro-batches a step.

    ``problem``: why a run would refuse this batch, or ""; the plan is then one of ``samples`` all the same, which is
    the share rounded down, but at least 1.
    """

    total: int
    samples: int
    micros: int
    problem: str = ""


def cut_batch(config: RunConfig, world: int) -> BatchCut:
    """The fewest micro-batches, and at least ``train.accumulation``, that cut the batch evenly over ``world`` ranks.

    No piece has more than ``train.micro_batch`` samples.
    """
    train = config.train
    batch, most = train.batch_size, train.micro_batch
    for micros in range(train.accumulation, batch // world + 1):
        size, rest = divmod(batch, world * micros)
        if rest == 0 and (most is None or size <= most):
            return BatchCut(batch, size, micros)
    parts = world * train.accumulation
    nearest = max(parts, round(batch / parts) * parts)
    problem = (
        f"train.batch_size is {batch}, which {world} ranks × accumulation {train.accumulation} do not divide, so the"
        f" run would be refused: use {nearest}, or so many ranks as divide {batch // train.accumulation}"
    )
    samples = max(batch // parts, 1)
    return BatchCut(batch, min(samples, most or samples), train.accumulation, problem)
