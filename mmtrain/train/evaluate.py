"""Evaluation: every sample of a split exactly once, on any number of ranks."""

from __future__ import annotations

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
def evaluate(task: Task, model: nn.Module, source: Source, config: RunConfig, ranks: Ranks) -> dict[str, float]:
    """The task's metrics over the whole of ``source``; the same on every rank."""
    model.eval()
    names: list[str] = []
    totals = torch.zeros(0, dtype=torch.float64)
    batches = eval_batches(
        source, batch_size=config.eval.batch_size, rank=ranks.rank, world=ranks.world, workers=config.data.workers
    )
    for batch in batches:
        sums = task.measure(model, to_device(batch, ranks.device))
        names = sorted(sums)
        values = torch.stack([sums[name].cpu() for name in names])
        totals = values if not len(totals) else totals + values
    if ranks.world > 1:
        names, totals = _agree(names, totals, ranks)
    return task.metrics(dict(zip(names, totals.tolist(), strict=True)))


def _agree(names: list[str], totals: torch.Tensor, ranks: Ranks) -> tuple[list[str], torch.Tensor]:
    """Sum over ranks, where a rank may have had no sample at all."""
    known: list[list[str]] = [[] for _ in range(ranks.world)]
    torch.distributed.all_gather_object(known, names)
    names = max(known, key=len)
    if not len(totals):
        totals = torch.zeros(len(names), dtype=torch.float64)
    return names, ranks.sum(totals).cpu()
