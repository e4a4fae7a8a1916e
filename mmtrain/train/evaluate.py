"""Evaluation: every sample of a split exactly once, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from mmtrain.config import RunConfig
from mmtrain.data.loader import eval_batches
from mmtrain.data.source import Source
from mmtrain.parallel.ranks import Ranks
from mmtrain.tasks import Batch, Task


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


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
) -> dict[str, float]:
    """The task's metrics over the whole of ``source``; the same on every rank.

    Args:
        model: what is called on a batch.
        together: a forward pass is a collective, so all ranks make as many as the one with the most batches; what a
            rank makes beyond its own counts nowhere.
        beat: told at each batch, and before the ranks add up.
    """
    model.eval()
    names: list[str] = []
    totals = torch.zeros(0, dtype=torch.float64)
    for batch, counts in _batches(source, config, ranks, together):
        beat("evaluate")
        sums = task.measure(model, to_device(batch, ranks.device))
        if not counts:
            continue
        names = sorted(sums)
        values = torch.stack([sums[name].cpu() for name in names])
        totals = values if not len(totals) else totals + values
    beat("add up")
    if ranks.world > 1:
        names, totals = _agree(names, totals, ranks)
    return task.metrics(dict(zip(names, totals.tolist(), strict=True)))


def _batches(source: Source, config: RunConfig, ranks: Ranks, together: bool) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, and whether each counts."""
    size, made = config.eval.batch_size, 0
    batches = eval_batches(source, batch_size=size, rank=ranks.rank, world=ranks.world, workers=config.data.workers)
    for batch in batches:
        made += 1
        yield batch, True
    most = math.ceil(math.ceil(len(source) / ranks.world) / size)  # of rank 0
    if together and made < most:
        stand_in = source.fetch(np.zeros(1, dtype=np.int64), None)
        for _ in range(most - made):
            yield stand_in, False


def _agree(names: list[str], totals: torch.Tensor, ranks: Ranks) -> tuple[list[str], torch.Tensor]:
    """Sum over ranks, where a rank may have had no sample at all."""
    names = max(ranks.gather(names), key=len)
    if not len(totals):
        totals = torch.zeros(len(names), dtype=torch.float64)
    return names, ranks.sum(totals)
