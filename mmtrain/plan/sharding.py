"""Sharding of a model by FSDP2 over a mesh of any size, by really sharding it on the meta device.

The process group of the mesh is a fake one in this single process, and its collectives move no data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmtrain.config import ParallelConfig
from mmtrain.errors import UserError
from mmtrain.models.averaging import block_positions
from mmtrain.parallel.fsdp import apply_fsdp

#: With more shards than this, the model is sharded on the CPU. FSDP2 creates an empty tensor for every rank without a
#: share of a parameter, which takes ten times as long on the meta device. Only the memory of rank 0's part is touched.
_MANY_SHARDS = 64


@contextmanager
def fake_group(world: int) -> Iterator[None]:
    """Context in which this process is rank 0 of a fake process group of ``world`` ranks.

    Raises:
        UserError: If this process already has a process group.
    """
    if dist.is_initialized():
        raise UserError(
            "a plan needs its own process group, but this process already has one: plan before training starts, or in"
            " another process"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    Attributes:
        local: Elements per rank. As in FSDP2, the first dimension of every parameter is rounded up to a multiple of the
            number of shards.
        whole: Elements of the parameters.
        shards: Number of ranks that share one replica.
        wire_bytes: Bytes per element when gathered.
        count: Number of such units in the model.
        root: Whether it is the root unit, which stays gathered from the forward to the backward pass.
    """

    local: int
    whole: int
    shards: int
    wire_bytes: int
    count: int = 1
    root: bool = False

    @property
    def padded(self) -> int:
        """Elements of the gathered unit, including padding."""
        return self.local * self.shards


def fsdp_units(model: nn.Module, shape: tuple[int, ...], config: ParallelConfig) -> list[Unit]:
    """Shard ``model`` over a fake mesh and return its units on rank 0, the rank with the largest share.

    Sharding takes time in proportion to ranks × parameters. Therefore only one of several blocks with the same shapes
    is sharded, and the others are replaced by empty modules.

    Args:
        model: A model on the meta device. It is changed.
        shape: Shape of the mesh: (ranks,) for fsdp, (replicas, shards) for hsdp.
        config: The section ``parallel``.
    """
    counts = _thin_out(model)
    if shape[-1] > _MANY_SHARDS:
        model.to_empty(device="cpu")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    apply_fsdp(model, list(counts), mesh, config)
    units = []
    for module, parameters in _owned(model).items():
        times = next((n for block, n in counts.items() if module in set(block.modules())), 1)
        gather_dtype = cast(Any, module)._get_fsdp_state()._mp_policy.param_dtype
        units.append(
            Unit(
                local=sum(p.to_local().numel() for p in parameters),
                whole=sum(p.numel() for p in parameters),
                shards=shape[-1],
                wire_bytes=4 if gather_dtype is None else gather_dtype.itemsize,
                count=times,
                root=module is model,
            )
        )
    return units


def _thin_out(model: nn.Module) -> dict[nn.Module, int]:
    """Replace all but one block of each kind by modules without parameters. Return the number of blocks per kind."""
    kept: dict[tuple[Any, ...], nn.Module] = {}
    counts: Counter[nn.Module] = Counter()
    for where, i in block_positions(model):
        block = where[i]
        kind = (type(block), *((name, p.shape) for name, p in block.named_parameters()))
        first = kept.setdefault(kind, block)
        counts[first] += 1
        if block is not first:
            where[i] = nn.Identity()
    return dict(counts)


def _owned(model: nn.Module) -> dict[nn.Module, list[DTensor]]:
    """Return the parameters of each FSDP unit, without those of units inside it."""
    found: dict[nn.Module, list[DTensor]] = {}

    def visit(module: nn.Module, owner: nn.Module) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        for p in module.parameters(recurse=False):
            found.setdefault(owner, []).append(cast(DTensor, p.data))
        for child in module.children():
            visit(child, owner)

    visit(model, model)
    return found
