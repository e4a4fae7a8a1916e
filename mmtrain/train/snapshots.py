"""Save and restore all that a training goes on from: weights, moments, average, and where the run stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from mmtrain.config import RunConfig, to_yaml
from mmtrain.errors import UserError
from mmtrain.models.initialise import initial_weights
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import Parts, Strategy
from mmtrain.runs.folder import RunFolder
from mmtrain.train.checkpoint.store import CheckpointStore
from mmtrain.train.checkpoint.tensor_files import read_tensors
from mmtrain.train.optim import WeightAverage
from mmtrain.train.state import TrainState


class Snapshots:
    """Moves a training state between memory (``strategy``, ``average``) and the checkpoints of ``run``."""

    def __init__(self, config: RunConfig, run: RunFolder, strategy: Strategy, ranks: Ranks) -> None:
        self.run, self.strategy, self.seed = run, strategy, config.seed
        options = config.checkpoint
        self.store = CheckpointStore(
            run.checkpoints,
            ranks,
            keep=options.keep,
            keep_every=options.keep_every,
            asynchronous=options.asynchronous,
            config=to_yaml(config),
        )
        decay = config.train.ema_decay
        self.average = WeightAverage(strategy.local_parameters(), decay) if decay is not None else None

    def begin(self, fresh: TrainState, build_meta_model: nn.Module) -> TrainState:
        """Load the newest valid checkpoint, or start from the seed; returns where the run stands.

        Raises:
            UserError: when the data is not what the run was trained on.
        """
        newest = self.store.newest()
        state = fresh
        if newest is None:
            self.strategy.initialise(initial_weights(build_meta_model, self.seed))
            if self.average is not None:
                self.average.reset(self.strategy.local_parameters())
        else:
            state = self._resume(newest, fresh)
        if self.strategy.saved_in_place:
            self.store.prepare(self._parts())
        return state

    def _resume(self, newest: Path, fresh: TrainState) -> TrainState:
        state = TrainState.read(newest)
        if state.dataset_length != fresh.dataset_length:
            raise UserError(
                f"{self.run.path} was trained on {state.dataset_length} samples, the data now has"
                f" {fresh.dataset_length}: restore the data, or start another run with name=…"
            )
        self.load(newest)
        return state

    def save(self, state: TrainState) -> None:
        self.store.save(state.step, self._parts(), state.to_json(), best=state.best_step)

    def _parts(self) -> Parts:
        return self.strategy.state_dict(self.average.shadow if self.average is not None else None)

    def load(self, path: Path) -> None:
        """Fill weights, moments and average from a checkpoint that was verified."""
        updates = TrainState.read(path).updates
        shadow = self.average.shadow if self.average is not None else None
        alone = self.strategy.ranks.world == 1
        self.strategy.load(lambda parts: read_tensors(path, parts, alone=alone), updates, shadow)

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
