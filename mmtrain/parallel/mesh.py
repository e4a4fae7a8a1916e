"""The device mesh of a run: one axis to shard over, and for HSDP another to replicate over."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mmtrain.config import ParallelConfig
from mmtrain.errors import UserError
from mmtrain.parallel.ranks import Ranks


def shard_group(world: int, local_world: int, config: ParallelConfig) -> int:
    """How many ranks share one copy of the parameters.

    Raises:
        UserError: when ``parallel.shard_size`` does not divide the number of ranks.
    """
    if config.strategy != "hsdp":
        return world
    size = config.shard_size or min(local_world, world)
    if world % size:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(
            f"parallel.shard_size is {size}, which does not divide {world} ranks: use {', '.join(map(str, fits))}"
        )
    return size


def mesh_of(ranks: Ranks, config: ParallelConfig) -> DeviceMesh:
    """The mesh of the run: (shard,) for fsdp, (replicate, shard) for hsdp."""
    size = shard_group(ranks.world, ranks.local_world, config)
    kind = ranks.device.type
    if config.strategy == "hsdp":
        return init_device_mesh(kind, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shard",))
