"""The FSDP2 and HSDP strategies: the device mesh, and the modules that are sharded and gathered as units."""

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
    """FSDP2: parameters, gradients and moments are sharded over a mesh. With a mesh of two axes this is HSDP."""

    collective_forward = True

    def _shard(self) -> None:
        options, cpu = self.options, self.ranks.device.type == "cpu"
        if type(self.model).__module__.startswith("mmtrain."):
            # FSDP2 warns if a module returns a view, since an in-place operation on it would lose the hook that gathers
            # the parameters for the backward pass. mmtrain's models and tasks change no output in place
            # (tests/train/test_outputs_in_place.py), so the warning concerns only other models.
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
        # Defer only if FSDP2 does not read the reduced gradient at once. It does so with replicas, or to accumulate.
        reduction.deferred = self.mesh.ndim == 1 and all(p.grad is None for p in self.parameters.values())
        super().backward(loss)
        reduction.finish()

    def local_parameters(self) -> dict[str, Tensor]:
        # After an evaluation some modules are still gathered (the root, and those kept until the backward pass). They
        # would ignore changes of the shards.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().local_parameters()

    def gradient_norm(self) -> Tensor:
        total = sum_of_squares(self.gradients(), self.ranks.device)
        dist.all_reduce(total, group=self.mesh.get_group(self.mesh.ndim - 1))
        return total.sqrt()


def build_mesh(ranks: Ranks, config: ParallelConfig) -> DeviceMesh:
    """Build the device mesh: axis (shard,) for fsdp, axes (replicate, shard) for hsdp.

    With hsdp the shard axis has ``parallel.shard_size`` ranks. Default: the ranks of a node.

    Raises:
        UserError: if ``parallel.shard_size`` does not divide the number of ranks.
    """
    kind, world = ranks.device.type, ranks.world
    if config.strategy != "hsdp":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    size = config.shard_size or min(ranks.local_world, world)
    if world % size:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(
            f"parallel.shard_size={size}: must divide the number of ranks ({world}). Use {', '.join(map(str, fits))}"
        )
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=("replicate", "shard"))


def apply_fsdp(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    config: ParallelConfig,
    own_unit_above: int | None = None,
) -> None:
    """Shard the parameters of ``model`` over ``mesh`` as DTensors, block by block. Works on the meta device.

    Each block is gathered when it runs. Parameters outside the blocks are gathered with the root. With
    ``parallel.gather=bf16``, matrices of the blocks are gathered in bfloat16. Modules marked ``keep_float32`` (with
    A_log, D and the bias of Δ) and norms are gathered separately in float32. Gradients are always reduced in float32.

    Args:
        own_unit_above: linear layers within blocks with more weight elements than this are gathered separately.
    """
    float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    lower = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    after = config.reshard_after_forward
    for block in blocks:
        policy = float32
        if config.gather == "bf16":
            policy = lower
            for module in _float32_modules(block):
                fully_shard(module, mesh=mesh, reshard_after_forward=after, mp_policy=float32)
        if own_unit_above is not None:
            for module in [m for m in block.modules() if isinstance(m, nn.Linear) and m is not block]:
                if module.weight.numel() > own_unit_above:
                    fully_shard(module, mesh=mesh, reshard_after_forward=after, mp_policy=policy)
        fully_shard(block, mesh=mesh, reshard_after_forward=after, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=float32)


def _float32_modules(block: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of ``block`` whose parameters must stay in float32."""
    found: list[nn.Module] = []
    for child in block.children():
        if getattr(child, "keep_float32", False) or isinstance(child, nn.LayerNorm):
            found.append(child)
        else:
            found += _float32_modules(child)
    return found
