"""Evaluate a model on every sample of a split exactly once, on any number of ranks."""

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

#: Batches between two checks for a stop signal on any rank.
_CHECK_EVERY = 8


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
    """Compute the metrics of ``task`` over all samples of ``source``.

    Args:
        model: module that ``task.measure`` calls on a batch.
        together: the forward pass is a collective. All ranks then run as many passes as the rank with the most
            batches. Results of additional passes are discarded.
        beat: called with the name of the phase at each batch and before the sums of the ranks are added.
        stop: returns whether this rank received a stop signal. The ranks exchange it every few batches.
        on_fault: called for each damaged sample.

    Returns:
        The metrics, equal on every rank, or None if a rank received a stop signal.
    """
    model.eval()
    names: list[str] = []
    totals = torch.zeros(0, dtype=torch.float64)
    for number, (batch, counts) in enumerate(_batches(source, config, ranks, together, on_fault)):
        beat("evaluate")
        if number % _CHECK_EVERY == 0 and ranks.any(stop()):
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
        names = max(ranks.gather(names), key=len)  # a rank without samples has no names
        totals = ranks.sum(totals if len(totals) else torch.zeros(len(names), dtype=torch.float64))
    return task.metrics(dict(zip(names, totals.tolist(), strict=True)))


def _batches(
    source: Source, config: RunConfig, ranks: Ranks, together: bool, on_fault: OnFault | None
) -> Iterator[tuple[Batch | None, bool]]:
    """Yield (batch, whether it counts) of this rank, as often as on the rank with the most batches.

    Additional batches do not count. They are None, or a batch of one sample if ``together``.
    """
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
    most = math.ceil(math.ceil(len(source) / ranks.world) / size)  # number of batches of rank 0
    if made < most:
        stand_in: Batch | None = None
        if together:  # use the first undamaged sample
            with closing(eval_batches(source, batch_size=1, device=ranks.device)) as usable:  # type: ignore[type-var]
                stand_in = next(usable, None)
        for _ in range(most - made):
            yield stand_in, False
