"""Batches moved to the device where they are wanted: on a GPU the next one is copied while this one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

Batch = dict[str, torch.Tensor]


def on_device(
    batches: Iterable[Batch], device: torch.device | None, finish: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Each batch on ``device`` (None: where it is) and finished there.

    For CUDA both happen on a stream of their own, one batch ahead: give batches in pinned memory.
    """
    if device is None or device.type != "cuda":
        for batch in batches:
            yield finish(batch)
        return
    side = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            sent = finish({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        if ahead is not None:
            yield _handed_over(ahead, side)
        ahead = sent
    if ahead is not None:
        yield _handed_over(ahead, side)


def _handed_over(batch: Batch, side: torch.cuda.Stream) -> Batch:
    """The stream that computes waits for the one that copied, and memory is not used again before it is done."""
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    for tensor in batch.values():
        tensor.record_stream(current)
    return batch
