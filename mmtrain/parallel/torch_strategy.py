"""The strategies that torch itself brings: one process, DistributedDataParallel, FSDP2 and HSDP."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mmtrain.parallel.fsdp import mesh_of, shard
from mmtrain.parallel.fsdp_cpu import DirectReduceScatter, shard_over_processors
from mmtrain.parallel.strategy import MODEL, MOMENTS, Fill, Parts, Plan, Strategy, norm_of


class TorchStrategy(Strategy):
    """Parameters that are whole on every rank, or DTensors; one torch optimizer over them."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.ranks, self.plan = model, plan.ranks, plan
        self._split()
        model.to_empty(device=plan.ranks.device)
        # the parameters as they are between steps: FSDP2 puts others in their place while a module runs
        self.parameters = dict(model.named_parameters())
        self.optimizer = plan.make_optimizer(model)
        self._fresh_moments()
        self.runner = self._wrap()

    def _split(self) -> None:
        """Split the parameters, which have no memory yet."""

    def _wrap(self) -> nn.Module:
        return self.model

    def _fresh_moments(self) -> None:
        """AdamW's state before its first step, which torch would make only then: a checkpoint is loaded into it."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                zeros = {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in MOMENTS}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}

    def set_parameter(self, name: str, value: Tensor) -> None:
        _set(self.parameters[name], value)

    def gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    def gradient_norm(self) -> Tensor:
        return norm_of(self.gradients(), self.ranks.device).sqrt()

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def state_dict(self, average: dict[str, Tensor] | None) -> Parts:
        return self._parts(average)

    def _parts(self, average: dict[str, Tensor] | None) -> Parts:
        """The very tensors of the training state, by part and name."""
        parts: Parts = {MODEL: self.local_parameters()}
        trained = {name: self.optimizer.state[p] for name, p in self.parameters.items() if p.requires_grad}
        parts |= {key: {name: state[key] for name, state in trained.items()} for key in MOMENTS}
        return parts | ({"average": average} if average is not None else {})

    def load(self, fill: Fill, updates: int, average: dict[str, Tensor] | None) -> None:
        fill(self._parts(average))
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)


class DataParallel(TorchStrategy):
    """Every rank holds everything; gradients are averaged in buckets while the backward pass runs."""

    def _wrap(self) -> nn.Module:
        # a depthwise convolution of channels-last images gives its gradient in that layout; DDP rightly copies it
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        cuda = self.ranks.device.type == "cuda"
        # DDP arranges its buckets anew after the first step, and where in a bucket a gradient lies decides in which
        # order the ranks' terms are added: a run that was started again would differ in its first step from one that
        # was not. It does not when it looks for unused parameters, which costs milliseconds: on a GPU only if asked for
        fixed = not cuda or torch.are_deterministic_algorithms_enabled()
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        # the weights are not broadcast: every rank computes or loads the same ones
        return DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.device.index] if cuda else None,
            gradient_as_bucket_view=True,
            init_sync=False,
            find_unused_parameters=fixed,
        )

    @property
    def evaluator(self) -> nn.Module:
        return self.model  # ranks may evaluate different numbers of batches

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, self.runner).no_sync()

    def state_dict(self, average: dict[str, Tensor] | None) -> Parts:
        """Every rank saves its share of the whole tensors."""
        parts = super().state_dict(average)
        world, rank = self.ranks.world, self.ranks.rank
        return {
            part: {name: t for i, (name, t) in enumerate(tensors.items()) if i % world == rank}
            for part, tensors in parts.items()
        }


class FullyShardedDataParallel(TorchStrategy):
    """FSDP2: parameters, gradients and moments split over the ranks of a mesh; HSDP where the mesh has two axes."""

    collective_forward = True

    def _split(self) -> None:
        plan = self.plan
        self.mesh = mesh_of(plan.ranks, plan.config)
        self._reduction: DirectReduceScatter | None = None
        if plan.ranks.device.type == "cpu":
            self._reduction = shard_over_processors(self.model, plan, self.mesh)
        else:
            shard(self.model, plan.blocks, self.mesh, plan.config)

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
        total = norm_of(self.gradients(), self.ranks.device)
        dist.all_reduce(total, group=self.mesh.get_group(self.mesh.ndim - 1))
        return total.sqrt()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        # every rank has the value: each takes its part of it, and nothing is sent
        split = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(split.to_local())
    else:
        parameter.copy_(value)
