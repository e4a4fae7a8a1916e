"""The interface of strategies, and the two simplest ones: a single process, and DDP.

The model is first built on the meta device. The strategy shards it and allocates memory. Then the weights are either
initialised from the seed or loaded from a checkpoint. Tensors are saved under the names of the parameters and with
their full shapes, so a checkpoint of any strategy loads into any other.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mmtrain.config import ParallelConfig
from mmtrain.parallel.ranks import Ranks

#: The tensors of a training state: {section: {parameter name: tensor}}. The sections are listed below.
StateDict = dict[str, dict[str, Tensor]]
#: Function that loads the tensors of a state dict in place, from a checkpoint.
LoadInto = Callable[[StateDict], None]
#: The sections of a training state: the weights, AdamW's two moments and, optionally, the averaged weights.
MODEL, MOMENTS, AVERAGE = "model", ("exp_avg", "exp_avg_sq"), "average"


@dataclass(frozen=True)
class StrategyOptions:
    """Arguments of a strategy.

    Attributes:
        ranks: the ranks of the run.
        config: the section ``parallel`` of the configuration.
        blocks: modules that FSDP shards and gathers as units, in order of execution.
        make_optimizer: builds the optimizer of a model whose parameters are already sharded.
        autocast: lower-precision dtype of autocast, or None.
        micro_batches: micro-batches per step.
        micro_batch_size: samples per micro-batch.
        plain: the blocks are not compiled, and nothing is recomputed in the backward pass.
    """

    ranks: Ranks
    config: ParallelConfig
    blocks: Sequence[nn.Module]
    make_optimizer: Callable[[nn.Module], Optimizer]
    autocast: torch.dtype | None = None
    micro_batches: int = 1
    micro_batch_size: int = 1
    plain: bool = False


class Strategy(ABC):
    """Interface of a training state that is distributed over ranks. All ranks call every method together.

    Attributes:
        model: module with the parameters, sharded or not.
        runner: module to call for a forward pass in training.
        optimizer: the optimizer of this rank's parameters or shards.
    """

    #: Whether a forward pass is a collective, so that all ranks must run the same number of passes.
    collective_forward = False
    #: Whether the model's parameters can be read between steps, as complete tensors or DTensors.
    readable = True
    #: Whether :meth:`state_dict` returns the tensors of the state themselves, at no cost, instead of gathered copies.
    saved_in_place = True

    model: nn.Module
    runner: nn.Module
    optimizer: Optimizer
    ranks: Ranks

    @property
    def evaluator(self) -> nn.Module:
        """Module to call for a forward pass in evaluation."""
        return self.runner

    @abstractmethod
    def set_parameter(self, name: str, value: Tensor) -> None:
        """Set parameter ``name`` to ``value``, a complete tensor on the CPU."""

    def initialise(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Set all parameters from pairs of name and complete tensor."""
        for name, value in weights:
            self.set_parameter(name, value)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of one micro-batch. Only the last reduces gradients."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return this rank's shards of the reduced gradient. They may be scaled in place before the step."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of the complete reduced gradient in float32. Equal on every rank."""

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradient by ``factor``."""
        gradients = self.gradients()
        if gradients:
            torch._foreach_mul_(gradients, factor)

    @abstractmethod
    def step(self, rate: float) -> None:
        """Update the weights with learning rate ``rate`` and drop the gradients."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Drop the gradients without updating the weights."""

    @abstractmethod
    def local_parameters(self) -> dict[str, Tensor]:
        """Return this rank's shard of each parameter, by name (a DTensor under FSDP2). It may be changed in place."""

    @abstractmethod
    def state_dict(self, average: dict[str, Tensor] | None) -> StateDict:
        """Return the tensors to save.

        Args:
            average: averaged weights, sharded like :meth:`local_parameters`, or None.
        """

    @abstractmethod
    def load(self, load_into: LoadInto, updates: int, average: dict[str, Tensor] | None) -> None:
        """Load a saved state.

        Args:
            load_into: loads the tensors of a state dict in place.
            updates: number of optimizer steps taken.
            average: averaged weights to load, or None.
        """

    def close(self) -> None:
        """Release resources outside the model."""
        return


class TorchStrategy(Strategy):
    """Strategy with a torch optimizer over complete parameters or DTensors. Used directly for a single process."""

    def __init__(self, model: nn.Module, options: StrategyOptions) -> None:
        self.model, self.ranks, self.options = model, options.ranks, options
        self._shard()
        model.to_empty(device=options.ranks.device)
        # Keep the sharded parameters. FSDP2 replaces them by gathered ones while a module runs.
        self.parameters = dict(model.named_parameters())
        self.optimizer = options.make_optimizer(model)
        # Create AdamW's state now, so that a checkpoint can be loaded. torch creates it at the first step.
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                zeros = {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in MOMENTS}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        self.runner = self._wrap()

    def _shard(self) -> None:
        """Shard the parameters, which have no memory yet."""

    def _wrap(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def set_parameter(self, name: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            # Every rank has the value and takes its shard of it, without communication.
            sharded = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(sharded.to_local())
        else:
            parameter.copy_(value)

    def gradients(self) -> list[Tensor]:
        return [to_local(p.grad) for p in self.parameters.values() if p.grad is not None]

    def gradient_norm(self) -> Tensor:
        return sum_of_squares(self.gradients(), self.ranks.device).sqrt()

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def state_dict(self, average: dict[str, Tensor] | None) -> StateDict:
        return self._state(average)

    def _state(self, average: dict[str, Tensor] | None) -> StateDict:
        """Return the tensors of the training state themselves, not copies."""
        trained = {name: self.optimizer.state[p] for name, p in self.parameters.items() if p.requires_grad}
        moments = {key: {name: state[key] for name, state in trained.items()} for key in MOMENTS}
        return {MODEL: self.local_parameters(), **moments, **({AVERAGE: average} if average is not None else {})}

    def load(self, load_into: LoadInto, updates: int, average: dict[str, Tensor] | None) -> None:
        load_into(self._state(average))
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)


class DDPStrategy(TorchStrategy):
    """DDP: every rank has a replica. Gradients are averaged in buckets during the backward pass."""

    def _wrap(self) -> nn.Module:
        # The gradient of a depthwise convolution of channels-last images has that layout. DDP copies it correctly.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        cuda = self.ranks.device.type == "cuda"
        # DDP rearranges its buckets after the first step, which changes the order of additions. The first step after a
        # resume would then differ from an uninterrupted run. find_unused_parameters prevents the rearrangement at a
        # cost of milliseconds. On a GPU it is used only with train.deterministic.
        fixed = not cuda or torch.are_deterministic_algorithms_enabled()
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        return DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.device.index] if cuda else None,
            gradient_as_bucket_view=True,
            init_sync=False,  # every rank computes or loads the same weights
            find_unused_parameters=fixed,
        )

    @property
    def evaluator(self) -> nn.Module:
        return self.model  # not the DDP module, since ranks may evaluate different numbers of batches

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, self.runner).no_sync()

    def state_dict(self, average: dict[str, Tensor] | None) -> StateDict:
        """Return every ``world``-th tensor, so that the ranks divide the saving."""
        world, rank = self.ranks.world, self.ranks.rank
        return {
            section: {name: t for i, (name, t) in enumerate(tensors.items()) if i % world == rank}
            for section, tensors in self._state(average).items()
        }


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all elements of ``tensors``, as a float32 scalar on ``device``."""
    present = [t for t in tensors if t.numel()]
    if not present:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(present)).float().square().sum()
