"""The device mesh of a run: one axis to shard over, and for HSDP another to replicate over.

Split a model with FSDP2, from outside: each block is gathered when it runs, and the rest with the root.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    config: ParallelConfig,
    apart: int | None = None,
) -> None:
    """Make the parameters of ``model`` DTensors over ``mesh``, block by block; works on the meta device.

    Linear layers within blocks whose matrix has more than ``apart`` elements are gathered on their own.
    With ``parallel.gather=bf16`` the blocks' matrices travel as bf16. What must stay float32 (modules marked
    ``keep_float32``, which hold A_log, D and the bias of Δ, and all norms) travels on its own, and gradients are always
    reduced in float32.
    """
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    after = config.reshard_after_forward
    for block in blocks:
        if config.gather == "bf16":
            for island in _islands(block):
                fully_shard(island, mesh=mesh, reshard_after_forward=after, mp_policy=whole)
        policy = narrow if config.gather == "bf16" else whole
        for part in _large(block, apart) if apart is not None else ():
            fully_shard(part, mesh=mesh, reshard_after_forward=after, mp_policy=policy)
        fully_shard(block, mesh=mesh, reshard_after_forward=after, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=whole)


def _islands(block: nn.Module) -> list[nn.Module]:
    """The outermost modules of ``block`` whose parameters must not be narrowed."""
    found: list[nn.Module] = []
    for child in block.children():
        if getattr(child, "keep_float32", False) or isinstance(child, nn.LayerNorm):
            found.append(child)
        else:
            found += _islands(child)
    return found


def _large(block: nn.Module, elements: int) -> list[nn.Linear]:
    """The linear layers inside ``block`` whose matrix has more ``elements``."""
    inside = (m for m in block.modules() if isinstance(m, nn.Linear) and m is not block)
    return [linear for linear in inside if linear.weight.numel() > elements]
