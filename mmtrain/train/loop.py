"""The train loop: one for every task.

All that a step does is a function of (configuration, weights, step): the order of samples, their augmentation and
the masks of dropout follow from the seed and the number of samples consumed. So a run that is killed and started
again ends in the same weights as one that was not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mmtrain.config import RunConfig
from mmtrain.data.loader import train_batches
from mmtrain.errors import UserError
from mmtrain.models.stochastic import sample_keys
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import deferred_reduction, wrap
from mmtrain.tasks import Batch, StepKey, Task
from mmtrain.train.checkpoint import CheckpointStore, load_state, load_tensors
from mmtrain.train.ema import WeightAverage
from mmtrain.train.evaluate import evaluate, to_device
from mmtrain.train.optim import build_optimizer, learning_rate
from mmtrain.train.preemption import StopRequest
from mmtrain.train.run_folder import RunFolder
from mmtrain.train.state import Schedule, TrainState
from mmtrain.train.tracking import Tracker

logger = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Outcome:
    """How a call of :meth:`Trainer.fit` ended. ``stopped_by`` is the signal that ended it early, if one did."""

    step: int
    finished: bool
    test: dict[str, float] | None = None
    stopped_by: int | None = None


class Trainer:
    """Trains ``task`` in ``run``, going on from the newest valid checkpoint there."""

    def __init__(self, config: RunConfig, task: Task, run: RunFolder, ranks: Ranks, tracker: Tracker) -> None:
        self.config, self.task, self.run, self.ranks, self.tracker = config, task, run, ranks, tracker
        self.model = task.build_model().to(ranks.device)
        self.parallel = wrap(self.model, ranks)
        self.optimizer = build_optimizer(self.model, config.optim)
        decay = config.train.ema_decay
        self.average = WeightAverage(self.model, decay) if decay is not None else None
        self.schedule = Schedule.of(config, len(task.train))
        self.state = TrainState(dataset_length=len(task.train))
        self.store = CheckpointStore(run.checkpoints, ranks, config.checkpoint.keep)
        self.saved_at = time.monotonic()

    def fit(self) -> Outcome:
        """Train to the end, or until a signal asks to stop; then test the selected checkpoint."""
        self._resume()
        with StopRequest() as stop:
            for micro_batches in self._steps():
                self._train_step(micro_batches)
                if self._evaluation_is_due():
                    self._evaluate()
                    self._save()
                elif self._save_is_due():
                    self._save()
                if self.ranks.any(stop.received is not None):
                    self._save()
                    return Outcome(self.state.step, finished=False, stopped_by=stop.received or 15)
                if self._out_of_patience():
                    break
        return self._finish()

    # ------------------------------------------------------------------ one step

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of each remaining step, from the sample after the last one consumed."""
        train, micros = self.config.train, self.config.train.accumulation
        remaining = self.schedule.steps - self.state.step
        if remaining <= 0:
            return
        batches = train_batches(
            self.task.train,
            seed=self.config.seed,
            batch_size=train.batch_size,
            start=self.state.samples,
            steps=remaining,
            rank=self.ranks.rank,
            world=self.ranks.world,
            micros=micros,
            workers=self.config.data.workers,
            window=self.config.data.shuffle_window,
        )
        while group := self.tracker.waiting(lambda: list(islice(batches, micros))):
            yield group

    def _train_step(self, micro_batches: list[Batch]) -> None:
        config, state = self.config, self.state
        rate = learning_rate(config.optim, state.step, self.schedule.steps, self.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.parallel.train()
        loss = self._backward(micro_batches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm or float("inf"))
        # DDP has summed the gradients, so that every rank sees the same norm and takes the same branch
        if torch.isfinite(norm):
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.model, state.step)
            state.bad_in_a_row = 0
        else:
            self._skip(norm)
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.samples += config.train.batch_size
        self.tracker.after_step(state, loss, norm, rate)

    def _backward(self, micro_batches: list[Batch]) -> Tensor:
        """Gradients of the mean loss of the step, summed over micro-batches; returns this rank's mean loss."""
        total = torch.zeros((), device=self.ranks.device)
        key = StepKey(self.config.seed, self.state.step)
        for i, batch in enumerate(micro_batches):
            batch = to_device(batch, self.ranks.device)
            with deferred_reduction(self.parallel, last=i == len(micro_batches) - 1):
                with sample_keys(batch["key"]), self._autocast():
                    loss = self.task.loss(self.parallel, batch, key) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        return total

    def _autocast(self) -> torch.autocast:
        enabled = self.config.train.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=enabled)

    def _skip(self, norm: Tensor) -> None:
        """Leave out a step whose gradient is not finite; stop after too many in a row."""
        self.state.skipped += 1
        self.state.bad_in_a_row += 1
        limit = self.config.train.max_bad_steps
        self.tracker.warn(f"step {self.state.step}: the gradient norm is {norm.item()}: the step is skipped")
        if self.state.bad_in_a_row >= limit:
            raise UserError(
                f"{limit} steps in a row had a gradient that is not finite: lower optim.lr, raise"
                " optim.warmup_epochs, or use train.precision=fp32; the last checkpoint is from before them"
            )

    # ------------------------------------------------------------------ evaluation and checkpoints

    def _evaluation_is_due(self) -> bool:
        return self.state.step % self.schedule.eval_every == 0 or self.state.step == self.schedule.steps

    def _evaluate(self) -> None:
        results = self._measure("val")
        state, value = self.state, results[self.task.metric]
        better = state.best is None or (value > state.best if self.task.higher_is_better else value < state.best)
        if better:
            state.best, state.best_step, state.evals_since_best = value, state.step, 0
        else:
            state.evals_since_best += 1
        self.tracker.after_evaluation(state, "val", results, best=better)

    def _measure(self, split: str) -> dict[str, float]:
        source = {"val": self.task.val, "test": self.task.test}[split]
        assert source is not None
        with self._averaged(), self._autocast():
            return evaluate(self.task, self.model, source, self.config, self.ranks)

    def _averaged(self) -> Any:
        from contextlib import nullcontext

        return self.average.applied(self.model) if self.average is not None else nullcontext()

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.state.evals_since_best >= patience

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        if every is not None and self.state.step % every == 0:
            return True
        minutes = (time.monotonic() - self.saved_at) / 60
        return self.ranks.any(minutes >= self.config.checkpoint.every_minutes)

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
        if self.average is not None:
            tensors["average"] = self.average.shadow
        return tensors

    def _save(self) -> None:
        self.state.tracker_id = self.tracker.run_id
        self.store.save(self.state.step, self._tensors(), self.state.to_json(), best=self.state.best_step)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        newest = self.store.newest()
        if newest is not None:
            state = TrainState(**load_state(newest))
            if state.dataset_length != len(self.task.train):
                raise UserError(
                    f"{self.run.path} was trained on {state.dataset_length} samples, the data now has"
                    f" {len(self.task.train)}: restore the data, or start another run with name=…"
                )
            self._load(newest)
            self.state = state
        self.tracker.start(self.state, self.schedule)

    def _load(self, path: Any) -> None:
        tensors = self._tensors()
        load_tensors(path, tensors)
        set_model_state_dict(self.model, tensors["model"])
        set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])

    # ------------------------------------------------------------------ the end

    def _finish(self) -> Outcome:
        if self.store.newest() != self.store.at(self.state.step):
            self._save()
        chosen = self.state.best_step if self.config.eval.select == "best" else self.state.step
        assert chosen is not None
        self._load(self.store.at(chosen))
        results = self._measure("test") if self.task.test is not None else None
        if self.ranks.main:
            with self._averaged():
                pictures = self.task.illustrate(self.model.eval(), self.run.path)
            self.run.write_result(
                {
                    "step": self.state.step,
                    "tested_step": chosen,
                    "val": {self.task.metric: self.state.best},
                    "test": results,
                    "skipped_steps": self.state.skipped,
                    "pictures": [p.name for p in pictures],
                }
            )
        self.tracker.finish(self.state, results, chosen)
        self.ranks.barrier()
        return Outcome(self.state.step, finished=True, test=results)
