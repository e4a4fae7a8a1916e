"""Where a run stands: a few numbers, saved with every checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.train.checkpoint.store import load_state


@dataclass
class TrainState:
    """``step`` and ``samples`` are what was *consumed*; the data clock needs nothing else.

    ``updates``: steps that changed the weights. ``left_out``: samples that a rollback passed over.
    ``evaluation_due``: the run left in the middle of the evaluation that belongs to this step.
    ``recent_losses``: what the next loss is compared with, where ``train.spike_factor`` asks for it.
    """

    step: int = 0
    samples: int = 0
    updates: int = 0
    best: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    left_out: int = 0
    evaluation_due: bool = False
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: float = 1.0
    good_in_a_row: int = 0
    dataset_length: int = 0
    tracker_id: str | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> TrainState:
        """The state in a checkpoint.

        Raises:
            UserError: for one of another version of mmtrain.
        """
        found = load_state(checkpoint)
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(found) - known):
            raise UserError(
                f"{checkpoint} is of another version of mmtrain: its state has {', '.join(unknown)}, unknown here"
                " (see code.json in the run folder)"
            )
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Schedule:
    """The length of a run in steps of the global batch: a function of the configuration and the data alone.

    A run sees ``epochs`` × N samples, rounded up to whole batches: batches run on over the borders of epochs.
    """

    steps: int
    warmup: int
    eval_every: int
    steps_per_epoch: float
    samples_per_epoch: int

    @classmethod
    def of(cls, config: RunConfig, samples: int) -> Schedule:
        per_epoch = samples / config.train.batch_size
        steps = math.ceil(config.train.epochs * per_epoch)
        if config.train.max_steps is not None:
            steps = min(steps, config.train.max_steps)
        every = config.eval.every_steps or max(1, round(config.eval.every_epochs * per_epoch))
        warmup = min(round(config.optim.warmup_epochs * per_epoch), steps)
        return cls(steps, warmup, every, per_epoch, samples)
