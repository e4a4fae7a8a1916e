"""Tasks combine a model, a loss, metrics and data.

Each task is one module of this package. ``@TASKS.implements`` registers it for its configuration section. The train
loop is in :mod:`mmtrain.train`.
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
    """Key for the randomness of a whole step. Equal on every rank and for every micro-batch of the step."""

    seed: int
    step: int


class _Head:
    """A data source that consists of the first ``length`` samples of another one."""

    def __init__(self, source: Source, length: int) -> None:
        self.source = source
        self.block_sizes = [min(length, len(source))]

    def __len__(self) -> int:
        return self.block_sizes[0]

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        return self.source.fetch(indices, keys)


class Task(ABC):
    """Interface of a task: model, loss, metrics and data of one kind of problem.

    An evaluation adds up sums over samples (:meth:`measure`) over all batches and ranks. :meth:`metrics` computes the
    metrics from the totals.

    Attributes:
        train: the training split.
        val: the validation split.
        test: the test split, or None.
    """

    #: The metric that selects the best checkpoint.
    metric: ClassVar[str]
    #: Whether a higher value of ``metric`` is better.
    higher_is_better: ClassVar[bool]
    #: The metrics that are plotted in addition to the loss.
    plotted: ClassVar[tuple[str, ...]]

    #: The number of variates in a sample, for forecasting.
    variates: int | None = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.train: Source
        self.val: Source
        self.test: Source | None = None

    def shorten(self, length: int) -> None:
        """Keep only the first ``length`` samples of each split, for debugging."""
        self.train = _Head(self.train, length)
        self.val = _Head(self.val, length)
        self.test = _Head(self.test, length) if self.test is not None else None

    def check_batch(self, local: int) -> None:  # noqa: B027 - most tasks accept any batch
        """Raise UserError if the task cannot train with micro-batches of ``local`` samples per rank."""

    def check_assets(self, assets: dict[str, Any], owner: str | Path) -> None:  # noqa: B027 - as above
        """Raise UserError if the data does not fit the ``assets`` of a run or export, for example other classes.

        Args:
            owner: the run folder or export, for the message.
        """

    def build_model(self) -> nn.Module:
        """Build the model on torch's default device. The trainer sets its weights."""
        return build_model(self.config.model)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        """Return the mean loss of a training batch, a scalar."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the samples of an evaluation batch (float64 scalars). ``count`` is the number of samples."""

    @abstractmethod
    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Compute the metrics from the sums of :meth:`measure` over a whole split."""

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the training data, which a resumed run compares. Cached, since it reads a whole table."""
        return fingerprint_of(self.train)

    @abstractmethod
    def assets(self) -> dict[str, Any]:
        """Return the data that prediction needs in addition to the weights, as JSON values."""

    def illustrate(self, model: nn.Module, folder: Path) -> list[Path]:
        """Draw plots of the trained model's results on the test split. Return the files written."""
        return []


def build_task(config: RunConfig) -> Task:
    """Build the task of ``config.task.kind`` and open its data."""
    return cast(Task, TASKS.implementation(config.task)(config))
