"""Evaluation: every sample of a split exactly once, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import nn

from mmtrain.config import RunConfig
from mmtrain.data.core.loader import eval_batches
from mmtrain.data.core.source import OnFault, Source
from mmtrain.parallel.ranks import Ranks
from mmtrain.tasks import Batch, Task

#: Batches between two looks at whether a rank was asked to leave.
_LOOK_EVERY = 8


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    source: Source,
    config: RunConfig,
    ranks: Ranks,
    *,
    together: bool = False,
    beat: Callable[[str], None] = lambda phase: None,
    stop: Callable[[], bool] = lambda: False,
    on_fault: OnFault | None = None,
) -> dict[str, float] | None:
    """The task's metrics over the whole of ``source``, the same on every rank; None where it was given up.

    Args:
        model: what is called on a batch.
        together: a forward pass is a collective, so all ranks make as many as the one with the most batches; what a
            rank makes beyond its own counts nowhere.
        beat: told at each batch, and before the ranks add up.
        stop: whether this rank was asked to leave; all ranks look at it together every few batches.
        on_fault: told of samples that cannot be used.
    """
    model.eval()
    names: list[str] = []
    totals = torch.zeros(0, dtype=torch.float64)
    for number, (batch, counts) in enumerate(_batches(source, config, ranks, together, on_fault)):
        beat("evaluate")
        if number % _LOOK_EVERY == 0 and ranks.any(stop()):
            return None
        if batch is None:
            continue
        sums = task.measure(model, batch)
        if not counts:
            continue
        names = sorted(sums)
        values = torch.stack([sums[name].cpu() for name in names])
        totals = values if not len(totals) else totals + values
    beat("add up")
    if ranks.world > 1:
        names = max(ranks.gather(names), key=len)  # a rank may have had no sample at all
        totals = ranks.sum(totals if len(totals) else torch.zeros(len(names), dtype=torch.float64))
    return task.metrics(dict(zip(names, totals.tolist(), strict=True)))


def _batches(
    source: Source, config: RunConfig, ranks: Ranks, together: bool, on_fault: OnFault | None
) -> Iterator[tuple[Batch | None, bool]]:
    """This rank's batches, and whether each counts; as many as the rank with the most has, with None for none."""
    size, made = config.eval.batch_size, 0
    batches = eval_batches(
        source,
        batch_size=size,
        rank=ranks.rank,
        world=ranks.world,
        workers=config.data.workers,
        device=ranks.device,
        on_fault=on_fault,
    )
    for batch in batches:
        made += 1
        yield batch, True
    most = math.ceil(math.ceil(len(source) / ranks.world) / size)  # of rank 0
    if made < most:
        stand_in: Batch | None = None
        if together:  # on the first sample that can be used
            with closing(eval_batches(source, batch_size=1, device=ranks.device)) as usable:  # type: ignore[type-var]
                stand_in = next(usable, None)
        for _ in range(most - made):
            yield stand_in, False
