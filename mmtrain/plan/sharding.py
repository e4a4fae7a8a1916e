"""How FSDP2 would split a model over a mesh of any size: by really splitting it, on the meta device.

The process group of the mesh is in this one process, for shapes only: no collective of it moves anything.
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
from mmtrain.models.averaging import block_places
from mmtrain.parallel.fsdp import apply_fsdp

#: With more shards than this, what is left of the model is split on the CPU: FSDP2 makes an empty tensor for every rank
#: that gets nothing of a parameter, which on the meta device costs ten times as much. Only rank 0's pages are touched.
_MANY = 64


@contextmanager
def fake_group(world: int) -> Iterator[None]:
    """Within the context this process is rank 0 of ``world``; afterwards there is no process group, as before.

    Raises:
        UserError: when this process is in a process group already.
    """
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


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at once, ``count`` times in the model.

    ``local``: elements on each rank, where the first dimension of every parameter is rounded up to a multiple of the
    shards, as FSDP2 does; ``whole``: elements of the parameters; ``shards``: ranks that share one copy. ``wire_bytes``:
    bytes an element when gathered. ``root``: stays gathered from forward to backward.
    """

    local: int
    whole: int
    shards: int
    wire_bytes: int
    count: int = 1
    root: bool = False

    @property
    def padded(self) -> int:
        """Elements that a gather brings together, padding included."""
        return self.local * self.shards


def fsdp_units(model: nn.Module, shape: tuple[int, ...], config: ParallelConfig) -> list[Unit]:
    """Split ``model`` (on the meta device) over a fake mesh and read off the parts of rank 0, the fullest.

    Splitting takes time in proportion to ranks × parameters, so of the blocks that hold the same shapes one is split,
    and stands for all; the others are emptied.

    Args:
        shape: the mesh: (ranks,) for fsdp, (copies, shards) for hsdp.
    """
    counts = _thin_out(model)
    if shape[-1] > _MANY:
        model.to_empty(device="cpu")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    apply_fsdp(model, list(counts), mesh, config)
    units = []
    for module, parameters in _owned(model).items():
        times = next((n for block, n in counts.items() if module in set(block.modules())), 1)
        narrow = cast(Any, module)._get_fsdp_state()._mp_policy.param_dtype
        units.append(
            Unit(
                local=sum(p.to_local().numel() for p in parameters),
                whole=sum(p.numel() for p in parameters),
                shards=shape[-1],
                wire_bytes=4 if narrow is None else narrow.itemsize,
                count=times,
                root=module is model,
            )
        )
    return units


def _thin_out(model: nn.Module) -> dict[nn.Module, int]:
    """Keep one block of each kind, with the number of them, and put modules without parameters in the others' place."""
    kept: dict[tuple[Any, ...], nn.Module] = {}
    counts: Counter[nn.Module] = Counter()
    for where, i in block_places(model):
        block = where[i]
        kind = (type(block), *((name, p.shape) for name, p in block.named_parameters()))
        first = kept.setdefault(kind, block)
        counts[first] += 1
        if block is not first:
            where[i] = nn.Identity()
    return dict(counts)


def _owned(model: nn.Module) -> dict[nn.Module, list[DTensor]]:
    """The parameters of each FSDP unit: those that no unit within it holds."""
    found: dict[nn.Module, list[DTensor]] = {}

    def visit(module: nn.Module, owner: nn.Module) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        for p in module.parameters(recurse=False):
            found.setdefault(owner, []).append(cast(DTensor, p.data))
        for child in module.children():
            visit(child, owner)

    visit(model, model)
    return found
