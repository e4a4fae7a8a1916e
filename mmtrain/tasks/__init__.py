"""Tasks: the only place where model, loss, metrics and data meet.

A task is one module here, registered for its section with ``@TASKS.implements``. How training steps are taken belongs
to ``mmtrain.train``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mmtrain.config import TASKS, RunConfig
from mmtrain.data.core.fingerprint import Fingerprint, fingerprint_of
from mmtrain.data.core.source import Source
from mmtrain.models import build_model

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepKey:
    """What a task may derive randomness of a whole step from: the same on every rank and micro-batch."""

    seed: int
    step: int


class _Head:
    """The first samples of a source."""

    def __init__(self, source: Source, length: int) -> None:
        self.source = source
        self.block_sizes = [min(length, len(source))]

    def __len__(self) -> int:
        return self.block_sizes[0]

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        return self.source.fetch(indices, keys)


class Task(ABC):
    """Model, loss, metrics and data of one kind of problem. The trainer drives any of them.

    Metrics are kept as sums over samples, so that they can be added over batches and ranks before they are divided.
    """

    #: The metric that chooses the best checkpoint.
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    #: The metrics that the curves show beside the loss.
    plotted: ClassVar[tuple[str, ...]]

    #: The number of series in a sample, for a forecaster.
    variates: int | None = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.train: Source
        self.val: Source
        self.test: Source | None = None

    def shorten(self, length: int) -> None:
        """Keep the first ``length`` samples of each split: for debugging only."""
        self.train = _Head(self.train, length)
        self.val = _Head(self.val, length)
        self.test = _Head(self.test, length) if self.test is not None else None

    def check_batch(self, local: int) -> None:  # noqa: B027 - most tasks take any batch
        """Raise UserError when the task cannot train on batches of ``local`` samples a rank and micro-batch."""

    def check_assets(self, assets: dict[str, Any], owner: str | Path) -> None:  # noqa: B027 - as above
        """Raise UserError where this data means something else than that of the run or export ``owner``."""

    def build_model(self) -> nn.Module:
        """The model, on torch's default device; its weights are set by the trainer, from the seed or a checkpoint."""
        return build_model(self.config.model)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        """The mean loss of a training batch, a scalar."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums (float64 scalars) over an evaluation batch, among them ``count``, the number of samples."""

    @abstractmethod
    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics from sums over a whole split."""

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What a run that goes on compares its training data by; made once, since it reads all rows of a table."""
        return fingerprint_of(self.train)

    @abstractmethod
    def assets(self) -> dict[str, Any]:
        """What prediction needs beside the weights, as JSON values."""

    def illustrate(self, model: nn.Module, folder: Path) -> list[Path]:
        """Draw what the trained model does on the test split; returns the pictures written."""
        return []


def build_task(config: RunConfig) -> Task:
    """The task that ``config.task.kind`` names, with its data opened."""
    return cast(Task, TASKS.implementation(config.task)(config))
