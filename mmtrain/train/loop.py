"""The train loop: one for every task and every strategy.

A step depends only on the configuration, the weights and the step number: the order of samples, their augmentation and
the dropout masks are derived from the seed and the number of samples consumed. A resumed run therefore ends with the
same weights as an uninterrupted one.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.config import RunConfig
from mmtrain.data.core.loader import train_batches
from mmtrain.data.core.source import FaultLog, OnFault, Source
from mmtrain.errors import SharedError
from mmtrain.models.stochastic import sample_keys
from mmtrain.parallel.ranks import Ranks, collective_timeout, set_collective_timeout
from mmtrain.parallel.strategy import to_local
from mmtrain.parallel.watchdog import Watchdog
from mmtrain.plotting import try_to_draw
from mmtrain.runs.folder import RunFolder
from mmtrain.tasks import Batch, StepKey, Task
from mmtrain.train.build import build_meta_model, parallelize_model
from mmtrain.train.checkpoint.tensor_files import read_weights
from mmtrain.train.evaluate import evaluate
from mmtrain.train.guards import Agreement, agree, first_bad, initial_loss_scale, is_finite, is_spike, update_loss_scale
from mmtrain.train.meter import Meter
from mmtrain.train.optim import autocast_dtype, learning_rate, seed_step
from mmtrain.train.preemption import StopRequest
from mmtrain.train.profiling import StepProfiler
from mmtrain.train.state import Schedule, Snapshots, TrainState
from mmtrain.train.timing import exposed_reduction
from mmtrain.train.trackers.tracker import Tracker


@dataclass(frozen=True)
class Outcome:
    """Result of :meth:`Trainer.fit`. ``stopped_by`` is the signal that ended it early, or None."""

    step: int
    finished: bool
    test: dict[str, float] | None = None
    stopped_by: int | None = None


class Trainer:
    """Trains ``task`` in the run folder ``run``, starting from its newest valid checkpoint if there is one.

    ``micros`` is the number of micro-batches per step. ``strategy`` contains the model and the optimizer, ``state`` the
    progress of the run. ``snapshots`` saves and loads both. ``tracker`` logs. ``watch`` detects ranks that hang.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        run: RunFolder,
        ranks: Ranks,
        tracker: Tracker,
        watch: Watchdog,
        micros: int,
    ) -> None:
        self.config, self.task, self.run, self.ranks = config, task, run, ranks
        self.tracker, self.watch, self.micros = tracker, watch, micros
        self.strategy = parallelize_model(config, task, ranks, micros)
        self.snapshots = Snapshots(config, run, self.strategy, ranks)
        self.schedule = Schedule.of(config, len(task.train))
        self.state = TrainState(
            dataset_length=len(task.train), data=task.fingerprint, loss_scale=initial_loss_scale(config.train)
        )
        self.stop = StopRequest.current()
        self.meter = Meter(config, task, self.strategy, ranks)
        self.timer = self.meter.timer
        self.profiler = StepProfiler(config.train.profiled(), run.path, ranks)
        self.saved_at = time.monotonic()
        self._rewound = self._settled = False

    def fit(self) -> Outcome:
        """Train to the last step and test the selected checkpoint, or save and return early on a stop signal."""
        self.state = self.snapshots.begin(self.state, build_meta_model(self.task), self.task.assets)
        self.tracker.start(self.state, self.schedule)
        with self.stop, self.profiler, _no_automatic_gc():
            if self.ranks.any(self.stop.requested):
                return self._stopped()  # nothing has changed, so nothing is saved
            if (self.state.evaluation_due and not self._evaluate()) or not self._train():
                return self._stopped()
            return self._finish()

    def _train(self) -> bool:
        """Take the remaining steps. Return False if a rank received a stop signal; the run is then saved."""
        if self._out_of_patience():
            return True
        for batches in self._steps():
            self.profiler.step(self.state.step + 1)
            agreed = self._train_step(batches)
            self._settle()
            due = self.state.step % self.schedule.eval_every == 0 or self.state.step == self.schedule.steps
            evaluated = self._evaluate() if due and not self._rewound else None
            if agreed.save or agreed.stop or evaluated is not None:
                self._save()
            if agreed.stop or evaluated is False:
                self.snapshots.store.wait()
                return False
            if self._out_of_patience():
                break
            if self.state.step % self.config.train.gc_every == 0:
                gc.collect()
        return True

    def _stopped(self) -> Outcome:
        return Outcome(self.state.step, finished=False, stopped_by=self.stop.received or signal.SIGTERM)

    def close(self) -> None:
        """Wait for a running save and release the strategy."""
        self.snapshots.store.close()
        self.strategy.close()

    # ------------------------------------------------------------------ one step

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step, starting after the last consumed sample."""
        while (remaining := self.schedule.steps - self.state.step) > 0:
            self._rewound = False
            stream = train_batches(
                self.task.train,
                seed=self.config.seed,
                batch_size=self.config.train.batch_size,
                start=self.state.samples,
                steps=remaining,
                rank=self.ranks.rank,
                world=self.ranks.world,
                micros=self.micros,
                workers=self.config.data.workers,
                window=self.config.data.shuffle_window,
                device=self.ranks.device,
                on_fault=self._on_fault("train"),
            )
            with closing(stream):  # type: ignore[type-var]
                while not self._rewound and (batches := self._next(stream)):
                    yield batches

    def _next(self, stream: Iterator[Batch]) -> list[Batch]:
        self._beat("data")
        with self.timer.phase("data"):
            return list(islice(stream, self.micros))

    def _train_step(self, batches: list[Batch]) -> Agreement:
        config, state = self.config, self.state
        self.tracker.before_step()
        seed_step(config.seed, state.step, self.ranks.rank)
        rate = learning_rate(config.optim, state.step, self.schedule.steps, self.schedule.warmup)
        if not self.strategy.model.training:  # after an evaluation; train() visits all modules, which is slow
            self.strategy.runner.train()
        loss = self._backward(batches)
        self._beat("agree")
        with self.timer.phase("communication"):
            norm, agreed = self._agree(loss)
        self._beat("update")
        with self.timer.phase("optimizer"):
            if not agreed.finite:
                self._skip(batches)
            elif is_spike(config.train, state, agreed.loss):
                self._roll_back(agreed.loss)
                return agreed
            else:
                self._update(norm, rate)
        self.tracker.consumed(state.step, batches)
        state.step += 1
        state.samples += config.train.batch_size
        self.timer.end_step()
        self.tracker.after_step(state, agreed.loss, norm, rate, self.meter)
        return agreed

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Compute the gradients of all micro-batches. Return the mean loss of this rank."""
        total = torch.zeros((), device=self.ranks.device)
        for i, batch in enumerate(batches):
            with self.strategy.micro_batch(last=i == len(batches) - 1):
                self._beat("forward")
                with self.timer.phase("forward"):
                    loss = self._loss(batch) / len(batches)
                with self.timer.phase("backward"):
                    scaled = loss * self.state.loss_scale if self.state.loss_scale != 1 else loss
                    with exposed_reduction(scaled, self.timer):
                        self.strategy.backward(scaled)
            total += loss.detach()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        with sample_keys(batch["key"]), self._autocast():
            return self.task.loss(self.strategy.runner, batch, StepKey(self.config.seed, self.state.step))

    def _autocast(self) -> torch.autocast:
        dtype = autocast_dtype(self.config.train)
        return torch.autocast(self.ranks.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _agree(self, loss: Tensor) -> tuple[float, Agreement]:
        """Return the gradient norm and the ranks' agreement. The only point where a step waits for all ranks."""
        norm, value = torch.stack([self.strategy.gradient_norm(), loss.float()]).tolist()
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        by_step = every is not None and (self.state.step + 1) % every == 0
        agreed = agree(
            self.ranks,
            value if math.isfinite(norm) else math.nan,
            stop=self.stop.requested,
            save=by_step or time.monotonic() - self.saved_at >= 60 * minutes,
            save_failed=self.snapshots.store.failed,
        )
        if agreed.save_failed:
            self.snapshots.store.wait()  # raises
        return norm / self.state.loss_scale, agreed

    def _update(self, norm: float, rate: float) -> None:
        """Clip the gradient, update the weights and the averaged weights."""
        limit = self.config.optim.clip_norm
        factor = min(limit / (norm + 1e-6), 1.0) if limit is not None else 1.0
        if factor != 1 or self.state.loss_scale != 1:
            self.strategy.scale_gradients(factor / self.state.loss_scale)
        self.strategy.step(rate)
        self.snapshots.update_average(self.state.updates)
        self.state.updates += 1
        self.state.bad_in_a_row = 0
        update_loss_scale(self.state, self.config.train, finite=True)

    def _skip(self, batches: list[Batch]) -> None:
        """Skip a step with a non-finite loss or gradient. Raise SharedError after ``train.max_bad_steps`` in a row."""
        state, limit = self.state, self.config.train.max_bad_steps
        self.strategy.drop_gradients()
        if update_loss_scale(state, self.config.train, finite=False):
            return  # an fp16 overflow, which a smaller loss scale may prevent
        state.skipped += 1
        state.bad_in_a_row += 1
        self.tracker.warn(f"step {state.step}: the loss or its gradient is not finite. The step is skipped")
        if state.bad_in_a_row >= limit:
            found = first_bad(self.strategy.model, self._loss, batches, self.ranks)
            raise SharedError(
                f"the loss or gradient was not finite for {limit} consecutive steps: {found}. Lower optim.lr, raise"
                " optim.warmup_epochs, or use train.precision=fp32. The last checkpoint is from before these steps"
            )

    def _roll_back(self, loss: float) -> None:
        """Return to the last checkpoint and continue with the samples after this step."""
        self.strategy.drop_gradients()
        back = self.snapshots.roll_back(self.state, loss)
        self.tracker.rolled_back(self.state, back, loss)
        self.state, self._rewound = back, True

    def _settle(self) -> None:
        """Shorten the timeouts after the first step, when the data is open and the model is compiled."""
        if not self._settled and self.ranks.world > 1:
            self.ranks.barrier()
            set_collective_timeout(collective_timeout(self.config.parallel.step_timeout))
            self.watch.first_step_done()
        self._settled = True

    # ------------------------------------------------------------------ between steps

    def _evaluate(self) -> bool:
        """Evaluate on val. Return False if a rank received a stop signal; the next job then repeats the evaluation."""
        results = self._measure("val")
        self.state.evaluation_due = results is None
        if results is None:
            return False
        value, higher = results[self.task.metric], self.task.higher_is_better
        better = self.state.note_evaluation(value, higher_is_better=higher)
        self.tracker.after_evaluation(self.state, results, best=better)
        return True

    def _measure(self, split: str) -> dict[str, float] | None:
        source = self._source(split)
        assert source is not None
        with self.timer.paused(), self.snapshots.averaged(), self._autocast():
            return evaluate(
                self.task,
                self.strategy.evaluator,
                source,
                self.config,
                self.ranks,
                together=self.strategy.collective_forward,
                beat=self._beat,
                stop=lambda: self.stop.requested,
                on_fault=self._on_fault(split),
            )

    def _source(self, split: str) -> Source | None:
        return {"train": self.task.train, "val": self.task.val, "test": self.task.test}[split]

    def _on_fault(self, split: str) -> OnFault | None:
        """Return the callback that logs damaged samples, or None if the first one stops the run."""
        data, source = self.config.data, self._source(split)
        if data.faults == "stop" or source is None:
            return None
        file = self.run.faults / f"data_faults_rank_{self.ranks.rank:05d}.jsonl"
        return FaultLog(file, split, len(source), data.max_faults).add

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.state.evals_since_best >= patience

    def _save(self) -> None:
        self._beat("save")
        if self.ranks.main:
            self.run.check_there()
        with self.timer.paused():
            self.state.tracker_id = self.tracker.run_id
            self.snapshots.save(self.state)
        self.saved_at = time.monotonic()

    def _beat(self, phase: str) -> None:
        self.watch.beat(self.state.step + 1, phase)

    # ------------------------------------------------------------------ the end

    def _finish(self) -> Outcome:
        """Save, test the selected checkpoint, draw plots, and write the result."""
        self._beat("finish")
        store, state = self.snapshots.store, self.state
        self._save()
        store.wait()
        selected = state.best_step if self.config.eval.select == "best" else state.step
        assert selected is not None
        if selected != state.step and not store.whole(selected):
            self.tracker.warn(f"{store.at(selected)}: the best checkpoint is damaged or missing. The newest is tested")
            selected = state.step
        if selected != state.step:
            self.snapshots.load(store.at(selected))
        results = self._measure("test") if self.task.test is not None else None
        if results is None and self.task.test is not None:
            return self._stopped()  # the run is saved; the next job continues with the test
        self._refuse_broken(selected, results or {})
        pictures = self._illustrate(store.at(selected)) if self.ranks.main and self.config.tracking.plots else []
        if self.ranks.main:
            self.run.check_there()
            self.run.write_result(
                {
                    "step": state.step,
                    "tested_step": selected,
                    "checkpoint": store.at(selected).name,
                    "val": {self.task.metric: state.best},
                    "test": results,
                    "skipped_steps": state.skipped,
                    "pictures": [p.name for p in pictures],
                }
            )
        self.tracker.finish(state, results, selected, pictures)
        self.ranks.barrier()
        return Outcome(state.step, finished=True, test=results)

    def _refuse_broken(self, step: int, results: dict[str, float]) -> None:
        """Raise SharedError if the weights of ``step`` or their test results are not finite."""
        weights = all(is_finite(to_local(tensor)) for tensor in self.strategy.local_parameters().values())
        wrong = next((f"{name} on the test split is {x}" for name, x in results.items() if not math.isfinite(x)), None)
        if self.ranks.any(not weights):
            wrong = "weights are not finite"
        if wrong is not None:
            raise SharedError(
                f"the checkpoint of step {step} is unusable: {wrong}. No result was written. Lower optim.lr or raise"
                " optim.warmup_epochs, and train again in a new run folder"
            )

    def _illustrate(self, checkpoint: Path) -> list[Path]:
        """Draw the task's plots with a separate complete model, since the trained one may be sharded."""
        made: list[Path] = []

        def draw() -> None:
            model = self.task.build_model()
            read_weights(model, checkpoint, averaged=self.snapshots.average is not None)
            made.extend(self.task.illustrate(model.eval().to(self.ranks.device), self.run.path))

        try_to_draw(self.run.path / "test plots", draw)
        return made


@contextmanager
def _no_automatic_gc() -> Iterator[None]:
    """Disable automatic garbage collection within this context. It would pause one rank while the others wait.

    Objects that exist already (about 100,000, of libraries) are excluded from the collections of ``train.gc_every``.
    Each collection then takes a few milliseconds instead of a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
