"""FSDP2 between processes without a GPU, where gathering takes the very processors that compute.

Four things differ from a GPU. Collectives go straight from rank to rank (``direct.py``). Large matrices are gathered
on their own, so that less is whole at once. Each unit asks for the next one before it runs. And the last half of the
model stays whole between the forward and the backward pass: there is room for it, since the gradients, which are as
large, come into being while it is let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from mmtrain.buffers import Buffers
from mmtrain.parallel.direct import DirectAllGather, DirectReduceScatter
from mmtrain.parallel.fsdp import shard
from mmtrain.parallel.strategy import Plan

#: Elements of a matrix that is gathered on its own: 10 MB of float32.
_LARGE = 2_500_000


def shard_over_processors(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> DirectReduceScatter | None:
    """As :func:`mmtrain.parallel.fsdp.shard`, for a mesh of processes on CPUs; returns what reduces their gradients."""
    world = mesh.size(mesh.ndim - 1)
    shard(model, plan.blocks, mesh, plan.config, apart=_LARGE if plan.plain else None)
    if world == 1:
        return None
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    transient = Buffers()
    gather, reduce = DirectAllGather(transient), DirectReduceScatter(transient, world)
    for unit in units:
        unit.set_custom_all_gather(gather)
        unit.set_custom_reduce_scatter(reduce)
    if plan.plain:
        _keep_whole(_last_half(plan.blocks))
        _gather_ahead(model, plan.blocks)
    return reduce


def _last_half(blocks: Sequence[nn.Module]) -> list[FSDPModule]:
    """The last of the units in ``blocks`` that have at most half of their parameters together."""
    seen: set[int] = set()
    limit = sum(p.numel() for block in blocks for p in block.parameters()) / 2
    found: list[FSDPModule] = []
    for unit in reversed(_units(blocks)):
        fresh = [p for p in unit.parameters() if id(p) not in seen]  # type: ignore[attr-defined]
        seen |= {id(p) for p in fresh}
        limit -= sum(p.numel() for p in fresh)
        if limit < 0:
            break
        found.append(unit)
    return found


def _keep_whole(units: Sequence[FSDPModule]) -> None:
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)


def _gather_ahead(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let each unit ask for the next one of its stack of blocks, which is certain to run after it."""
    places = {id(module): name.rpartition(".")[0] for name, module in model.named_modules()}
    stacks: dict[str, list[nn.Module]] = {}
    for block in blocks:
        stacks.setdefault(places[id(block)], []).append(block)
    for stack in stacks.values():
        for unit, following in pairwise(_units(stack)):
            unit.set_modules_to_forward_prefetch([following])


def _units(blocks: Sequence[nn.Module]) -> list[FSDPModule]:
    """The units of ``blocks`` in the order in which they run."""
    return [module for block in blocks for module in block.modules() if isinstance(module, FSDPModule)]
