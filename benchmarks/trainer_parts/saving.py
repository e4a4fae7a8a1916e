"""Stall of training by an asynchronous save, compared with the time of a blocking save.

One process saves a ViM2-B with AdamW's moments (0.9 GB), with the strategy and checkpoint store of the trainer.
Blocking and asynchronous saves alternate. A blocking save ends when the whole checkpoint is durable. Training continues
while an asynchronous save is written, and these steps are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mmtrain.config import load_config
from mmtrain.models.initialise import initial_weights
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import Strategy
from mmtrain.tasks import Batch, StepKey, Task, build_task
from mmtrain.train.build import build_meta_model, micro_batches, parallelize_model
from mmtrain.train.checkpoint.store import CheckpointStore
from trainer_parts.figure import Figure, median_of


class Steps:
    """Training steps on one batch of two images."""

    def __init__(self, model: str, image_size: int) -> None:
        overrides = [f"model.name={model}", "data=synthetic", f"data.image_size={image_size}", "train.precision=fp32"]
        overrides += ["train.batch_size=2", "data.workers=0", "task.mixup=0", "task.cutmix=0", "device=cpu"]
        self.config = load_config("vim2_base_in1k", overrides)
        self.task: Task = build_task(self.config)
        alone = Ranks(0, 1, torch.device("cpu"))
        self.strategy: Strategy = parallelize_model(self.config, self.task, alone, micro_batches(self.config, 1))
        self.strategy.initialise(initial_weights(build_meta_model(self.task), 0))
        self.batch: Batch = {**self.task.train.fetch(np.arange(2), None), "key": torch.arange(2)}

    def take(self) -> float:
        """Take one step and return its seconds."""
        begun = time.perf_counter()
        self.strategy.runner.train()
        self.strategy.backward(self.task.loss(self.strategy.runner, self.batch, StepKey(0, 0)))
        self.strategy.step(1e-4)
        return time.perf_counter() - begun


def measure(folder: Path, *, model: str, repeats: int, image_size: int) -> Iterator[Figure]:
    ranks = Ranks(0, 1, torch.device("cpu"))
    steps = Steps(model, image_size)
    waited = CheckpointStore(folder / "blocking", ranks, keep=1)
    passing = CheckpointStore(folder / "asynchronous", ranks, keep=1, asynchronous=True)
    parts = steps.strategy.state_dict(None)
    size = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
    parameters = sum(t.numel() for t in parts["model"].values())
    passing.prepare(parts)  # as the trainer does before its first step
    for _ in range(2):
        steps.take()
    blocking, stalls, durable, idle, during = [], [], [], [], []
    for number in range(1, repeats + 1):
        idle += [steps.take(), steps.take()]
        begun = time.perf_counter()
        waited.save(number, steps.strategy.state_dict(None), {"step": number})
        blocking.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        passing.save(number, steps.strategy.state_dict(None), {"step": number})
        stalls.append(time.perf_counter() - begun)
        while not passing.at(number).exists() and not passing.failed:
            during.append(steps.take())
        durable.append(time.perf_counter() - begun)
        passing.wait()
    passing.close()
    detail = {
        "blocking_s": blocking,
        "stall_s": stalls,
        "durable_s": durable,
        "step_s": idle,
        "step_during_save_s": during,
    }
    subject = f"{model}: {parameters / 1e6:.1f} M parameters with moments, {size / 1e9:.2f} GB"
    ratios = [100 * a / b for a, b in zip(stalls, blocking, strict=True)]
    yield Figure(
        "async",
        "first asynchronous save: stall / blocking save",
        ratios[0],
        "%",
        f"{subject}; {stalls[0]:.3f} s of {blocking[0]:.2f} s, memory prepared at the start",
        target=10.0,
        detail=detail,
    )
    if repeats > 1:
        yield Figure(
            "async",
            "later asynchronous saves: stall / blocking save",
            **median_of(ratios[1:]),
            unit="%",
            how=f"median of {repeats - 1} pairs; {statistics.median(stalls[1:]):.3f} s of"
            f" {statistics.median(blocking[1:]):.2f} s",
            target=10.0,
        )
    slowdown = statistics.median(during) / statistics.median(idle) if during else 1.0
    yield Figure(
        "async",
        "steps while a save is written / steps without",
        slowdown,
        "x",
        f"median of {len(during)} and {len(idle)} steps; the write takes {statistics.median(durable):.2f} s during"
        f" steps that use all {torch.get_num_threads()} threads",
    )
