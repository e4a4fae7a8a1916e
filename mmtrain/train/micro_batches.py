"""How a global batch is cut: the same steps on any number of ranks."""

from __future__ import annotations

from mmtrain.config import RunConfig
from mmtrain.errors import SharedError


def micro_batches(config: RunConfig, world: int) -> int:
    """Micro-batches a step: the fewest, and at least ``train.accumulation``, that cut the batch evenly over ``world``
    ranks into pieces of at most ``train.micro_batch`` samples.

    Raises:
        SharedError: when the ranks do not divide the batch, with the numbers that do.
    """
    batch, most = config.train.batch_size, config.train.micro_batch
    for parts in range(config.train.accumulation, batch // world + 1):
        size, rest = divmod(batch, world * parts)
        if rest == 0 and (most is None or size <= most):
            return parts
    unit = world * config.train.accumulation
    fits = [n for n in range(1, batch + 1) if batch % n == 0 and batch // n >= config.train.accumulation]
    near = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
    raise SharedError(
        f"train.batch_size is {batch}, which {world} ranks and train.accumulation={config.train.accumulation} do not"
        f" divide: use so many ranks: {', '.join(map(str, fits[-12:])) or 'none fits'}; or a"
        f" batch that is a multiple of {unit} (use {' or '.join(map(str, near))})"
    )
