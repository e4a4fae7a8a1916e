"""What the trainer knows of parallelism: one small interface, whatever spreads the training state over the ranks.

The order is always the same: the model is built on the meta device, split (``__init__``), given memory, and then either
initialised from the seed or loaded from a checkpoint. Tensors are saved under the names of the parameters and in their
whole shapes, so that a checkpoint of any strategy loads into any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.config import ParallelConfig
from mmtrain.parallel.ranks import Ranks

#: Fills nested dicts of tensors, in place, from a checkpoint: {part: {name of a parameter: tensor}}.
Fill = Callable[[dict[str, dict[str, Tensor]]], None]
Parts = dict[str, dict[str, Tensor]]
#: The parts of a training state: the weights and AdamW's two moments.
MODEL, MOMENTS = "model", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Plan:
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
    #: Whether :meth:`saved` gives the very tensors of the state, for nothing, and not copies gathered for the purpose.
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
    def state_dict(self, average: dict[str, Tensor] | None) -> Parts:
        """The tensors to save: model, moments and, where there is one, the average (as :meth:`held` gives it)."""

    @abstractmethod
    def load(self, fill: Fill, updates: int, average: dict[str, Tensor] | None) -> None:
        """Read what :meth:`saved` gave. ``updates``: how many optimizer steps were taken."""

    def close(self) -> None:
        """Give back what the strategy holds outside the model."""
        return


def norm_of(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of all ``gradients``, float32, on ``device``."""
    present = [g for g in gradients if g.numel()]
    if not present:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(present)).float().square().sum()
