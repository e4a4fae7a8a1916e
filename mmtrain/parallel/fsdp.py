"""FSDP2 and HSDP: the device mesh, which modules are gathered together, and the strategy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mmtrain.config import ParallelConfig
from mmtrain.errors import UserError
from mmtrain.parallel.fsdp_cpu import LARGE, use_direct_collectives
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import TorchStrategy, sum_of_squares


class FSDPStrategy(TorchStrategy):
    """FSDP2: parameters, gradients and moments split over the ranks of a mesh; HSDP where the mesh has two axes."""

    collective_forward = True

    def _split(self) -> None:
        options, cpu = self.options, self.ranks.device.type == "cpu"
        if type(self.model).__module__.startswith("mmtrain."):
            # FSDP2 warns where a module returns a view, since an operation in place on it would lose the hook that
            # gathers the parameters for the backward pass. Our models and tasks change no output in place
            # (tests/train/test_outputs_in_place.py), so that the warning is right for models of others only.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        self.mesh = build_mesh(self.ranks, options.config)
        own_unit_above = LARGE if cpu and options.plain else None
        apply_fsdp(self.model, options.blocks, self.mesh, options.config, own_unit_above)
        self._reduction = use_direct_collectives(self.model, options, self.mesh) if cpu else None

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        root = cast(FSDPModule, self.model)
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        reduction = self._reduction
        if reduction is None:
            super().backward(loss)
            return
        # FSDP2 reads what was reduced at once only where it adds to a gradient that is there, or over the replicas
        reduction.deferred = self.mesh.ndim == 1 and all(p.grad is None for p in self.parameters.values())
        super().backward(loss)
        reduction.finish()

    def local_parameters(self) -> dict[str, Tensor]:
        # an evaluation leaves some modules whole (the root, and those that stay whole until their backward pass):
        # what is written to the parts would not be seen there
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().local_parameters()

    def gradient_norm(self) -> Tensor:
        total = sum_of_squares(self.gradients(), self.ranks.device)
        dist.all_reduce(total, group=self.mesh.get_group(self.mesh.ndim - 1))
        return total.sqrt()


def build_mesh(ranks: Ranks, config: ParallelConfig) -> DeviceMesh:
    """The mesh of the run: (shard,) for fsdp, (replicate, shard) for hsdp, of ``parallel.shard_size`` ranks or a node.

    Raises:
        UserError: when ``parallel.shard_size`` does not divide the number of ranks.
    """
    kind, world = ranks.device.type, ranks.world
    if config.strategy != "hsdp":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    size = config.shard_size or min(ranks.local_world, world)
    if world % size:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(
            f"parallel.shard_size is {size}, which does not divide {world} ranks: use {', '.join(map(str, fits))}"
        )
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=("replicate", "shard"))


def apply_fsdp(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    config: ParallelConfig,
    own_unit_above: int | None = None,
) -> None:
    """Make the parameters of ``model`` DTensors over ``mesh``, block by block; works on the meta device.

    Each block is gathered when it runs, and what is in no block with the root. Linear layers within blocks whose matrix
    has more than ``own_unit_above`` elements are gathered on their own. With ``parallel.gather=bf16`` the blocks'
    matrices travel as bf16. What must stay float32 (modules marked ``keep_float32``, which hold A_log, D and the bias
    of Δ, and all norms) travels on its own, and gradients are always reduced in float32.
    """
    float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    after = config.reshard_after_forward
    for block in blocks:
        policy = float32
        if config.gather == "bf16":
            policy = narrow
            for module in _float32_modules(block):
                fully_shard(module, mesh=mesh, reshard_after_forward=after, mp_policy=float32)
        if own_unit_above is not None:
            for module in [m for m in block.modules() if isinstance(m, nn.Linear) and m is not block]:
                if module.weight.numel() > own_unit_above:
                    fully_shard(module, mesh=mesh, reshard_after_forward=after, mp_policy=policy)
        fully_shard(block, mesh=mesh, reshard_after_forward=after, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=float32)


def _float32_modules(block: nn.Module) -> list[nn.Module]:
    """The outermost modules of ``block`` whose parameters must not be narrowed."""
    found: list[nn.Module] = []
    for child in block.children():
        if getattr(child, "keep_float32", False) or isinstance(child, nn.LayerNorm):
            found.append(child)
        else:
            found += _float32_modules(child)
    return found
