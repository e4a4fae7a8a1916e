"""A process group of any size in one process, for shapes only: no collective of it moves anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mmtrain.errors import UserError


@contextmanager
def fake_group(world: int) -> Iterator[None]:
    """Within the context this process is rank 0 of ``world``; afterwards there is no process group, as before.

    Raises:
        UserError: when this process is in a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError(
            "mmtrain plan makes a process group of its own, and this process is in one: plan before training starts,"
            " or in another process"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
