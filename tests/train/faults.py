"""Faults to build into a rank: each is called with the rank's number before the run starts, and patches the code."""

from __future__ import annotations

import os
import random
import resource
import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mmtrain.train.checkpoint.store as checkpoint
import mmtrain.train.session  # noqa: F401 - so that a server which preloads this module has imported all
from mmtrain.data.series.table_source import SeriesWindows
from mmtrain.models.tsm2 import TSM2
from mmtrain.tasks import Batch, StepKey
from mmtrain.tasks.forecasting import Forecasting
from mmtrain.train.checkpoint.store import CheckpointStore
from mmtrain.train.checkpoint.tensor_files import Stage


@dataclass(frozen=True)
class All:
    """Several faults at once."""

    faults: tuple[Any, ...]

    def __call__(self, rank: int) -> None:
        for fault in self.faults:
            fault(rank)


@dataclass(frozen=True)
class InLoss(ABC):
    """The base of what happens in the loss of a step: :meth:`change` gets it, on rank ``on`` (None: on every rank)."""

    on: int | None = None

    def __call__(self, rank: int) -> None:
        if self.on is not None and rank != self.on:
            return
        sound = Forecasting.loss

        def loss(task: Forecasting, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
            return self.change(sound(task, model, batch, key), model, batch, key.step)

        Forecasting.loss = loss  # type: ignore[method-assign]

    @abstractmethod
    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor: ...


@dataclass(frozen=True)
class NanLoss(InLoss):
    """The loss of ``steps`` is not a number."""

    steps: tuple[int, ...] = ()

    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return loss * float("nan") if step in self.steps else loss


@dataclass(frozen=True)
class NanWeight(InLoss):
    """From ``step`` on a weight is not a number."""

    step: int = 0

    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor:
        if step >= self.step:
            first = next(model.parameters())
            first.data.view(-1)[0] = float("nan")
        return loss


@dataclass(frozen=True)
class Spike(InLoss):
    """The loss is a hundred times as large for the samples at positions ``first`` to ``last`` of the stream."""

    first: int = 0
    last: int = 0

    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor:
        place = batch["position"]
        hit = bool(((place >= self.first) & (place <= self.last)).any())
        return loss * 100 if hit else loss


@dataclass(frozen=True)
class Crash(InLoss):
    """A defect in a task."""

    step: int = 0

    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor:
        if step >= self.step:
            raise RuntimeError(f"a defect at step {step}")
        return loss


@dataclass(frozen=True)
class Kill(InLoss):
    """SIGKILL in step ``step``, at samples from ``position`` on."""

    step: int = 0
    position: int = 0

    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor:
        if step == self.step and int(batch["position"][0]) >= self.position:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


@dataclass(frozen=True)
class GlobalNoise(InLoss):
    """A task whose loss draws from the global generators of torch, numpy and Python."""

    def change(self, loss: Tensor, model: nn.Module, batch: Batch, step: int) -> Tensor:
        return loss * (0.5 + torch.rand(()) + np.random.rand() + random.random())


@dataclass(frozen=True)
class InfInput:
    """Training sample ``sample`` holds an infinity."""

    sample: int

    def __call__(self, rank: int) -> None:
        sound = SeriesWindows.fetch

        def fetch(source: SeriesWindows, indices: np.ndarray, keys: np.ndarray | None) -> Batch:
            batch = sound(source, indices, keys)
            if keys is not None:
                batch["past"][torch.from_numpy(indices == self.sample)] = float("inf")
            return batch

        SeriesWindows.fetch = fetch  # type: ignore[method-assign]


@dataclass(frozen=True)
class Overflow:
    """On rank ``on`` the modules of class ``kind`` overflow in training."""

    on: int
    kind: str

    def __call__(self, rank: int) -> None:
        if rank != self.on:
            return
        sound = TSM2.__init__

        def init(model: TSM2, *args: Any, **kwargs: Any) -> None:
            sound(model, *args, **kwargs)
            for module in model.modules():
                if type(module).__name__ == self.kind:
                    module.register_forward_hook(lambda m, inputs, out: out * float("inf") if m.training else out)

        TSM2.__init__ = init  # type: ignore[method-assign]


@dataclass(frozen=True)
class SmallFiles:
    """On rank ``on``, from the checkpoint of ``step`` on, no file may be longer than ``size`` bytes."""

    on: int
    step: int
    size: int = 6000  # metrics and messages fit, tensors do not

    def __call__(self, rank: int) -> None:
        if rank != self.on:
            return
        sound = CheckpointStore.save

        def save(store: CheckpointStore, step: int, *args: Any, **kwargs: Any) -> None:
            if step >= self.step:
                store.wait()  # the checkpoint before this one is to stand
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
            sound(store, step, *args, **kwargs)

        CheckpointStore.save = save  # type: ignore[method-assign]


@dataclass(frozen=True)
class NoStaging:
    """On rank ``on`` the copy of the state for an asynchronous save fails."""

    on: int

    def __call__(self, rank: int) -> None:
        if rank == self.on:

            def copy(stage: object, parts: object) -> None:
                raise MemoryError("no room for a copy")

            Stage.copy = copy  # type: ignore[method-assign,assignment]


@dataclass(frozen=True)
class NoManifest:
    """On rank 0 the manifest of a checkpoint cannot be written."""

    def __call__(self, rank: int) -> None:
        if rank == 0:

            def write(folder: object, entries: object) -> None:
                raise OSError(5, "Input/output error")

            checkpoint.write_manifest = write  # type: ignore[assignment]
