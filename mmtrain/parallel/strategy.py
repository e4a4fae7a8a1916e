"""The interface between the trainer and parallelism, and the two simplest strategies: one process, and DDP.

The order is always the same: the model is built on the meta device, split (``__init__``), given memory, and then either
initialised from the seed or loaded from a checkpoint. Tensors are saved under the names of the parameters and in their
whole shapes, so that a checkpoint of any strategy loads into any other.
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

#: The tensors of a training state: {part: {name of a parameter: tensor}}.
StateDict = dict[str, dict[str, Tensor]]
#: Fills the tensors of a state dict in place, from a checkpoint.
LoadInto = Callable[[StateDict], None]
#: The parts of a training state: the weights, AdamW's two moments and, where there is one, the average of the weights.
MODEL, MOMENTS, AVERAGE = "model", ("exp_avg", "exp_avg_sq"), "average"


@dataclass(frozen=True)
class StrategyOptions:
    """What a strategy is made for. ``blocks``: the modules that are gathered one at a time, each with its dtype.

    ``make_optimizer`` is called on the parameters as the strategy has split them. ``plain``: each block runs once in a
    step, as it is written: neither compiled nor computed again in the backward pass.
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
    """A training state spread over ranks.

    ``model`` carries the parameters (split or not); ``runner`` is what a forward pass calls, in training and evaluation
    alike. All ranks call every method together.
    """

    #: Whether a forward pass is a collective operation, so that all ranks must make the same number of them.
    collective_forward = False
    #: Whether the model's parameters can be read between steps, whole or as DTensors.
    readable = True
    #: Whether :meth:`state_dict` gives the very tensors of the state, for nothing, and not copies gathered for it.
    saved_in_place = True

    model: nn.Module
    runner: nn.Module
    optimizer: Optimizer
    ranks: Ranks

    @property
    def evaluator(self) -> nn.Module:
        """What an evaluation calls."""
        return self.runner

    @abstractmethod
    def set_parameter(self, name: str, value: Tensor) -> None:
        """Set parameter ``name`` to ``value``, whole and on the CPU."""

    def initialise(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            self.set_parameter(name, value)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: gradients are reduced once a step, in the last."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradient: what is scaled in place before the step."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole reduced gradient, float32; the same on every rank."""

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        gradients = self.gradients()
        if gradients:
            torch._foreach_mul_(gradients, factor)

    @abstractmethod
    def step(self, rate: float) -> None:
        """Update the weights with learning rate ``rate`` and drop the gradients."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Leave this step out."""

    @abstractmethod
    def local_parameters(self) -> dict[str, Tensor]:
        """This rank's part of each parameter, by name (a DTensor under FSDP2), to be read and written in place."""

    @abstractmethod
    def state_dict(self, average: dict[str, Tensor] | None) -> StateDict:
        """The tensors to save. ``average``: of the weights, split as :meth:`local_parameters` are."""

    @abstractmethod
    def load(self, load_into: LoadInto, updates: int, average: dict[str, Tensor] | None) -> None:
        """Read what :meth:`state_dict` gave. ``updates``: how many optimizer steps were taken."""

    def close(self) -> None:
        """Give back what the strategy holds outside the model."""
        return


class TorchStrategy(Strategy):
    """Parameters that are whole on every rank, or DTensors; one torch optimizer over them. As it is: one process."""

    def __init__(self, model: nn.Module, options: StrategyOptions) -> None:
        self.model, self.ranks, self.options = model, options.ranks, options
        self._split()
        model.to_empty(device=options.ranks.device)
        # the parameters as they are between steps: FSDP2 puts others in their place while a module runs
        self.parameters = dict(model.named_parameters())
        self.optimizer = options.make_optimizer(model)
        # AdamW's state before its first step, which torch would make only then: a checkpoint is loaded into it
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                zeros = {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in MOMENTS}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        self.runner = self._wrap()

    def _split(self) -> None:
        """Split the parameters, which have no memory yet."""

    def _wrap(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def set_parameter(self, name: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            # every rank has the value: each takes its part of it, and nothing is sent
            split = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(split.to_local())
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
        """The very tensors of the training state."""
        trained = {name: self.optimizer.state[p] for name, p in self.parameters.items() if p.requires_grad}
        moments = {key: {name: state[key] for name, state in trained.items()} for key in MOMENTS}
        return {MODEL: self.local_parameters(), **moments, **({AVERAGE: average} if average is not None else {})}

    def load(self, load_into: LoadInto, updates: int, average: dict[str, Tensor] | None) -> None:
        load_into(self._state(average))
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)


class DDPStrategy(TorchStrategy):
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
        return DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.device.index] if cuda else None,
            gradient_as_bucket_view=True,
            init_sync=False,  # every rank computes or loads the same weights
            find_unused_parameters=fixed,
        )

    @property
    def evaluator(self) -> nn.Module:
        return self.model  # ranks may evaluate different numbers of batches

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, self.runner).no_sync()

    def state_dict(self, average: dict[str, Tensor] | None) -> StateDict:
        """Every rank saves its share of the whole tensors."""
        world, rank = self.ranks.world, self.ranks.rank
        return {
            part: {name: t for i, (name, t) in enumerate(tensors.items()) if i % world == rank}
            for part, tensors in self._state(average).items()
        }


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Of all elements of ``tensors``, float32, on ``device``."""
    present = [t for t in tensors if t.numel()]
    if not present:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(present)).float().square().sum()
