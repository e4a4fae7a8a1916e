"""The schedule of a run, its progress, and saving and loading both with the tensors of a checkpoint.

A run resumes only with the data it was trained on. ``data.json`` in the run folder and every checkpoint (``data`` of
its state) contain the fingerprint of the data. If the data differs, the run stops with an error. With
``data.accept_changes=true`` it continues, records the changes in the journal, and stores the new fingerprint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from mmtrain.config import RunConfig, to_yaml
from mmtrain.data.core.fingerprint import Fingerprint, changes
from mmtrain.errors import SharedError, UserError
from mmtrain.log import logger
from mmtrain.models.initialise import initial_weights
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import StateDict, Strategy
from mmtrain.runs import journal
from mmtrain.runs.folder import RunFolder, checkpoint_name
from mmtrain.train.checkpoint.store import CheckpointStore, load_state
from mmtrain.train.checkpoint.tensor_files import read_tensors
from mmtrain.train.optim import WeightAverage


@dataclass(frozen=True)
class Schedule:
    """Length of a run in steps, warm-up included. It depends only on the configuration and the number of samples N.

    A run consumes ``epochs`` × N samples, rounded up to whole global batches. A batch may span two epochs.
    """

    steps: int
    warmup: int
    eval_every: int
    steps_per_epoch: float
    samples_per_epoch: int

    @classmethod
    def of(cls, config: RunConfig, samples: int) -> Schedule:
        """Compute the schedule for a training set of ``samples`` samples."""
        per_epoch = samples / config.train.batch_size
        steps = math.ceil(config.train.epochs * per_epoch)
        if config.train.max_steps is not None:
            steps = min(steps, config.train.max_steps)
        every = config.eval.every_steps or max(1, round(config.eval.every_epochs * per_epoch))
        warmup = min(round(config.optim.warmup_epochs * per_epoch), steps)
        return cls(steps, warmup, every, per_epoch, samples)


Count = Annotated[int, Field(ge=0)]


@dataclass
class TrainState:
    """Progress of a run, saved as JSON in every checkpoint.

    Attributes:
        step: steps taken, skipped steps included.
        samples: samples consumed. They determine the next sample.
        updates: steps that changed the weights.
        best: best value of the task's metric so far; ``best_step`` is its step.
        evals_since_best: evaluations without improvement.
        skipped: steps without an update because loss or gradient was not finite.
        bad_in_a_row: consecutive skipped steps up to now.
        rollbacks: number of rollbacks so far.
        left_out: samples that were not trained on because of rollbacks.
        evaluation_due: the run stopped during the evaluation of this step.
        recent_losses: losses that the next one is compared with (``train.spike_factor``).
        loss_scale: loss scale of fp16; ``good_in_a_row`` counts finite steps since its last change.
        dataset_length: number of training samples.
        data: fingerprint of the training data; None in checkpoints of version 0.1.0.
        tracker_id: run identifier of the external tracker.
    """

    step: Count = 0
    samples: Count = 0
    updates: Count = 0
    best: float | None = None
    best_step: Count | None = None
    evals_since_best: Count = 0
    skipped: Count = 0
    bad_in_a_row: Count = 0
    rollbacks: Count = 0
    left_out: Count = 0
    evaluation_due: bool = False
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    good_in_a_row: Count = 0
    dataset_length: Count = 0
    data: dict[str, Any] | None = None
    tracker_id: str | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> TrainState:
        """Read the state of a checkpoint.

        Raises:
            SharedError: if the checkpoint is damaged or was written by an incompatible version of mmtrain.
        """
        found = load_state(checkpoint)
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(found) - known):
            raise SharedError(
                f"{checkpoint} was written by another version of mmtrain: this version does not know"
                f" {', '.join(unknown)} of its state. Use the version named in code.json of the run folder"
            )
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(found), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(checkpoint, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if checkpoint.name != checkpoint_name(state.step):
            raise _damaged(checkpoint, f"it names step {found.get('step')}")
        return state

    @property
    def trained_on(self) -> TrainedOn:
        """The data that the weights were trained on."""
        return TrainedOn(self.dataset_length, self.data)

    def note_evaluation(self, value: float, *, higher_is_better: bool) -> bool:
        """Record the result of an evaluation of this step. Return True if it is the best so far."""
        if self.best is None or math.isnan(self.best):  # any number is better than NaN
            better = self.best is None or not math.isnan(value)
        else:
            better = value > self.best if higher_is_better else value < self.best
        if better:
            self.best, self.best_step, self.evals_since_best = value, self.step, 0
        else:
            self.evals_since_best += 1
        return better


def _damaged(checkpoint: Path, fault: str) -> SharedError:
    return SharedError(
        f"{checkpoint / 'state.json'} is damaged ({fault}). Restore it, or delete {checkpoint.name} to use the"
        " previous checkpoint"
    )


class Snapshots:
    """Saves and loads the checkpoints of ``run``: model, optimizer, averaged weights and :class:`TrainState`."""

    def __init__(self, config: RunConfig, run: RunFolder, strategy: Strategy, ranks: Ranks) -> None:
        self.config, self.run, self.strategy = config, run, strategy
        options, decay = config.checkpoint, config.train.ema_decay
        self.store = CheckpointStore(
            run.checkpoints,
            ranks,
            keep=options.keep,
            keep_every=options.keep_every,
            asynchronous=options.asynchronous,
            config=to_yaml(config),
        )
        self.average = WeightAverage(strategy.local_parameters(), decay) if decay is not None else None

    def begin(self, fresh: TrainState, meta_model: nn.Module, assets: Callable[[], dict[str, Any]]) -> TrainState:
        """Load the newest valid checkpoint, or initialise the weights from the seed.

        Args:
            fresh: state of a run that starts at step 0, with the fingerprint of the present data.
            meta_model: the model on the meta device.
            assets: returns the assets of the task. They replace those of the run if it accepts changed data.

        Returns:
            The state of the checkpoint, or ``fresh``.

        Raises:
            UserError: if the data or the configuration differs from the one the run was trained with.
        """
        newest = self.store.newest()
        if newest is not None:
            self.run.check(self.config, newest / "config.yaml")
        state = fresh if newest is None else TrainState.read(newest)
        found = None if newest is None else state.trained_on
        self.strategy.ranks.on_main(
            lambda: check_data(self.config, self.run, fresh.trained_on, found, state.step, assets)
        )
        state.dataset_length, state.data = fresh.dataset_length, fresh.data
        if newest is None:
            self.strategy.initialise(initial_weights(meta_model, self.config.seed))
            if self.average is not None:
                self.average.reset(self.strategy.local_parameters())
        else:
            self.load(newest)
        if self.strategy.saved_in_place:
            self.store.prepare(self._tensors())
        return state

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of ``state`` and all tensors."""
        self.store.save(state.step, self._tensors(), asdict(state), best=state.best_step)

    def _tensors(self) -> StateDict:
        return self.strategy.state_dict(self._shadow)

    @property
    def _shadow(self) -> dict[str, Any] | None:
        return self.average.shadow if self.average is not None else None

    def load(self, path: Path) -> None:
        """Load weights, optimizer moments and averaged weights from a verified checkpoint."""
        updates = TrainState.read(path).updates
        alone = self.strategy.ranks.world == 1
        self.strategy.load(lambda tensors: read_tensors(path, tensors, alone=alone), updates, self._shadow)

    def roll_back(self, state: TrainState, loss: float) -> TrainState:
        """Load the newest checkpoint because ``loss``, the loss of the step after ``state``, is a spike.

        The run then continues with the samples after that step. Samples between the checkpoint and there are skipped.

        Returns:
            The state of the checkpoint, with the stream position after the spike.

        Raises:
            SharedError: if there is no checkpoint, or after ``train.max_bad_steps`` rollbacks.
        """
        train = self.config.train
        self.store.wait()
        newest = self.store.newest()
        if newest is None or state.rollbacks >= train.max_bad_steps:
            times = f"the run was rolled back {state.rollbacks} times already (train.max_bad_steps)"
            why = "there is no checkpoint yet" if newest is None else times
            raise SharedError(
                f"step {state.step}: the loss jumped to {loss:.4g}, above train.spike_factor ="
                f" {train.spike_factor} times its median, and {why}. Lower optim.lr or raise train.spike_factor"
            )
        self.load(newest)
        back, reached = TrainState.read(newest), state.samples + train.batch_size
        back.rollbacks, back.left_out = state.rollbacks + 1, state.left_out + reached - back.samples
        back.samples = reached
        return back

    def update_average(self, updates: int) -> None:
        """Update the averaged weights, if there are any. ``updates`` is the number of earlier updates."""
        if self.average is not None:
            self.average.update(self.strategy.local_parameters(), updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, into the model within this context."""
        if self.average is None:
            yield
        else:
            with self.average.applied(self.strategy.local_parameters):
                yield


@dataclass(frozen=True)
class TrainedOn:
    """Identity of the training data: its number of samples and its fingerprint (None if version 0.1.0 wrote it)."""

    samples: int
    fingerprint: Fingerprint | None


def check_data(
    config: RunConfig,
    run: RunFolder,
    now: TrainedOn,
    found: TrainedOn | None,
    step: int,
    assets: Callable[[], dict[str, Any]],
) -> None:
    """Check that the present data is the data of the run folder and of the newest checkpoint.

    Only rank 0 calls it, since it writes: with ``data.accept_changes`` the new fingerprint and ``assets`` replace those
    of the run folder.

    Args:
        now: the present data.
        found: the data of the newest checkpoint, or None without a checkpoint.
        step: step of that checkpoint.
        assets: returns the assets of the present data.

    Raises:
        UserError: if the data differs and changes are not accepted. The message lists the differences.
    """
    own, fingerprint = run.data(), now.fingerprint or {}
    different = [] if own is None else changes(own, fingerprint)
    if found is not None and (different or not _accepted_before(run, own)):
        if found.samples != now.samples:
            different.insert(0, f"the run was trained on {found.samples} samples, the data now has {now.samples}")
        different += changes(found.fingerprint or {}, fingerprint)
    different = list(dict.fromkeys(different))
    unknown = own is None and (found is None or found.fingerprint is None)
    if different and not config.data.accept_changes:
        raise UserError(
            f"{run.path}: the data differs from the data that the run was trained on:\n  "
            + "\n  ".join(different)
            + "\nRestore the data, start another run with name=…, or continue with the changed data:"
            " data.accept_changes=true"
        )
    if different or unknown:
        _record(run, fingerprint, different, step, assets)


def _accepted_before(run: RunFolder, own: Fingerprint | None) -> bool:
    """Return whether the run accepted changed data, so that older checkpoints may have another fingerprint."""
    return own is not None and any(line.get("kind") == "data_changed" for line in journal.read(run.path))


def _record(
    run: RunFolder, data: Fingerprint, different: list[str], step: int, assets: Callable[[], dict[str, Any]]
) -> None:
    if different:
        logger.warning("%s continues with changed data (data.accept_changes=true): %s", run.path, "; ".join(different))
        journal.record(run.path, "data_changed", step=step, changes=different)
        run.write_assets(assets())
    else:
        logger.warning(
            "%s was started by an earlier version, which stored no fingerprint of the data. mmtrain cannot check that"
            " the data is unchanged. It stores the fingerprint now, for later checks",
            run.path,
        )
        journal.record(run.path, "data_recorded", step=step)
    run.write_data(data)
