"""What a run goes on from: its schedule, where it stands, and the exchange of state and tensors with checkpoints.

A run continues only with the data that it was trained on. The fingerprint of the data is in ``data.json`` of the run
folder and in every checkpoint (``data`` of its state). A run that finds other data stops; with
``data.accept_changes=true`` it continues, the journal says what has changed, and the data is that of the run from then
on.
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


Count = Annotated[int, Field(ge=0)]


@dataclass
class TrainState:
    """Where a run stands: a few numbers, saved as JSON with every checkpoint.

    ``step`` and ``samples`` are what was *consumed*; the order of the data needs nothing else.
    ``updates``: steps that changed the weights. ``left_out``: samples that a rollback passed over.
    ``evaluation_due``: the run left in the middle of the evaluation that belongs to this step.
    ``data``: the fingerprint of the training data; None in checkpoints of earlier versions.
    ``recent_losses``: what the next loss is compared with, where ``train.spike_factor`` asks for it.
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
        """The state in a checkpoint.

        Raises:
            SharedError: for one of another version of mmtrain, or one that is damaged.
        """
        found = load_state(checkpoint)
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(found) - known):
            raise SharedError(
                f"{checkpoint} is of another version of mmtrain: its state has {', '.join(unknown)}, unknown here"
                " (see code.json in the run folder)"
            )
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(found), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(checkpoint, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if checkpoint.name != checkpoint_name(state.step):
            raise _damaged(checkpoint, f"it says step {found.get('step')}")
        return state

    @property
    def trained_on(self) -> TrainedOn:
        return TrainedOn(self.dataset_length, self.data)

    def note_evaluation(self, value: float, *, higher_is_better: bool) -> bool:
        """Take the result of an evaluation of this step; True if it is the best so far."""
        if self.best is None or math.isnan(self.best):  # anything is better than NaN, except NaN
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
        f"{checkpoint / 'state.json'} is damaged ({fault}): restore it, or remove {checkpoint.name} to use the"
        " checkpoint before it"
    )


class Snapshots:
    """Moves a training state between memory (``strategy``, ``average``) and the checkpoints of ``run``."""

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
        """Load the newest valid checkpoint, or start from the seed; returns where the run stands.

        ``assets``: of the task, for a run that accepts other data.

        Raises:
            UserError: when the data or the configuration is not what the run was trained with.
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
        self.store.save(state.step, self._tensors(), asdict(state), best=state.best_step)

    def _tensors(self) -> StateDict:
        return self.strategy.state_dict(self._shadow)

    @property
    def _shadow(self) -> dict[str, Any] | None:
        return self.average.shadow if self.average is not None else None

    def load(self, path: Path) -> None:
        """Fill weights, moments and average from a checkpoint that was verified."""
        updates = TrainState.read(path).updates
        alone = self.strategy.ranks.world == 1
        self.strategy.load(lambda tensors: read_tensors(path, tensors, alone=alone), updates, self._shadow)

    def roll_back(self, state: TrainState, loss: float) -> TrainState:
        """Load the last checkpoint because ``loss``, of the step after ``state``, has jumped.

        The run goes on with the samples after that step: those in between are left out.

        Raises:
            SharedError: without a checkpoint, or after ``train.max_bad_steps`` rollbacks.
        """
        train = self.config.train
        self.store.wait()
        newest = self.store.newest()
        if newest is None or state.rollbacks >= train.max_bad_steps:
            times = f"the run went back {state.rollbacks} times already (train.max_bad_steps)"
            why = "there is no checkpoint yet" if newest is None else times
            raise SharedError(
                f"step {state.step}: the loss jumped to {loss:.4g}, above train.spike_factor ="
                f" {train.spike_factor} times its median, and {why}: lower optim.lr, or raise the factor"
            )
        self.load(newest)
        back, reached = TrainState.read(newest), state.samples + train.batch_size
        back.rollbacks, back.left_out = state.rollbacks + 1, state.left_out + reached - back.samples
        back.samples = reached
        return back

    def update_average(self, updates: int) -> None:
        if self.average is not None:
            self.average.update(self.strategy.local_parameters(), updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the model holds the averaged weights, where they are kept."""
        if self.average is None:
            yield
        else:
            with self.average.applied(self.strategy.local_parameters):
                yield


@dataclass(frozen=True)
class TrainedOn:
    """The data that is trained on: its number of samples, and its fingerprint; None in what earlier versions wrote."""

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
    """Compare the data of ``now`` with that of the run, and with that of the newest checkpoint, which is of ``step``.

    For rank 0, since it writes: ``assets`` of the new data replace those of the run folder where changes are accepted.

    Raises:
        UserError: when the data is not what the run was trained on, with what changed.
    """
    own, fingerprint = run.data(), now.fingerprint or {}
    different = [] if own is None else changes(own, fingerprint)
    if found is not None and (different or not _accepted_before(run, own)):
        if found.samples != now.samples:
            different.insert(0, f"it was trained on {found.samples} samples, the data now has {now.samples}")
        different += changes(found.fingerprint or {}, fingerprint)
    different = list(dict.fromkeys(different))
    unknown = own is None and (found is None or found.fingerprint is None)
    if different and not config.data.accept_changes:
        raise UserError(
            f"{run.path}: the data is not what the run was trained on:\n  "
            + "\n  ".join(different)
            + "\nRestore the data, start another run with name=…, or continue with the data as it is now:"
            " data.accept_changes=true"
        )
    if different or unknown:
        _record(run, fingerprint, different, step, assets)


def _accepted_before(run: RunFolder, own: Fingerprint | None) -> bool:
    """Whether the data of the run is not that of its checkpoints because a change was accepted since."""
    return own is not None and any(line.get("kind") == "data_changed" for line in journal.read(run.path))


def _record(
    run: RunFolder, data: Fingerprint, different: list[str], step: int, assets: Callable[[], dict[str, Any]]
) -> None:
    if different:
        logger.warning("%s continues with other data (data.accept_changes=true): %s", run.path, "; ".join(different))
        journal.record(run.path, "data_changed", step=step, changes=different)
        run.write_assets(assets())
    else:
        logger.warning(
            "%s is of an earlier version, which kept no fingerprint of its data: whether this is the data it was"
            " trained on cannot be checked. From now on it can",
            run.path,
        )
        journal.record(run.path, "data_recorded", step=step)
    run.write_data(data)
