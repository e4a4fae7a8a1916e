"""How the global batch falls on ranks and micro-batches, and what to say where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.train.micro_batches import micro_batches


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
    """How a run on ``world`` ranks would cut its batch; with the words by which it would refuse to."""
    train = config.train
    batch, most = train.batch_size, train.micro_batch
    try:
        micros = micro_batches(config, world)
        return BatchCut(batch, batch // (world * micros), micros)
    except UserError as error:
        samples = max(batch // (world * train.accumulation), 1)
        return BatchCut(batch, min(samples, most or samples), train.accumulation, f"{error} (the run would be refused)")
