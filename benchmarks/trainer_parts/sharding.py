"""Comparison of FSDP2 with DDP: time per step and memory per rank, in two gloo processes with one thread each.

For the time, both strategies run in the same two processes with the same global batch and take alternating steps. For
the memory, each strategy has two fresh processes and a batch of one tiny image per rank, so that memory is mostly
parameters, gradients and moments. The figure is the growth of the peak of resident memory since just before the model
is built. It includes activations, buffers of collectives and memory kept by the allocator.
"""

from __future__ import annotations

import gc
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmtrain.config import RunConfig, load_config
from mmtrain.models.initialise import initial_weights
from mmtrain.parallel.ranks import Ranks, init_distributed
from mmtrain.parallel.strategy import Strategy, to_local
from mmtrain.tasks import Batch, StepKey, Task, build_task
from mmtrain.train.build import build_meta_model, micro_batches, parallelize_model
from trainer_parts.figure import Figure, median_of

WORLD = 2
Work = Callable[[Ranks, dict[str, Any]], Any]


def in_ranks(work: Work, options: dict[str, Any]) -> list[Any]:
    """Call ``work(ranks, options)`` on two ranks and return their results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (work, options, port, folder), nprocs=WORLD)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _rank(rank: int, work: Work, options: dict[str, Any], port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with init_distributed("cpu") as ranks:
        torch.save(work(ranks, options), f"{folder}/{rank}.pt")


class Training:
    """A model under one strategy, and a batch for it."""

    def __init__(self, strategy: str, ranks: Ranks, options: dict[str, Any]) -> None:
        self.config = _config(strategy, options)
        self.task: Task = build_task(self.config)
        micros = micro_batches(self.config, ranks.world)
        self.strategy: Strategy = parallelize_model(self.config, self.task, ranks, micros)
        self.strategy.initialise(initial_weights(build_meta_model(self.task), 0))
        self.strategy.runner.train()
        self.batch = _batch(self.task, self.config, ranks)
        self.taken = 0

    def step(self) -> None:
        with self.strategy.micro_batch(last=True):
            loss = self.task.loss(self.strategy.runner, self.batch, StepKey(0, self.taken))
            self.strategy.backward(loss)
        self.strategy.gradient_norm().item()
        self.strategy.step(1e-4)
        self.taken += 1

    def held(self) -> int:
        """Return the bytes of parameters, gradients and the two moments of this rank, which have the same size."""
        return 4 * sum(to_local(p).nbytes for p in self.strategy.local_parameters().values())


def _config(strategy: str, options: dict[str, Any]) -> RunConfig:
    overrides = [f"model.name={options['model']}", "data=synthetic", f"data.image_size={options['image_size']}"]
    overrides += ["train.precision=fp32", f"train.batch_size={options['batch']}", "data.workers=0", "task.mixup=0"]
    return load_config("vim2_base_in1k", [*overrides, "task.cutmix=0", f"parallel.strategy={strategy}", "device=cpu"])


def _batch(task: Task, config: RunConfig, ranks: Ranks) -> Batch:
    count = config.train.batch_size // ranks.world
    return {**task.train.fetch(np.arange(count) + ranks.rank * count, None), "key": torch.arange(count)}


def _times(ranks: Ranks, options: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of each step of both strategies. Their steps alternate: ddp, fsdp, fsdp, ddp, ..."""
    trainings = {name: Training(name, ranks, options) for name in ("ddp", "fsdp")}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(-options["warm_up"], options["pairs"]):
        for name in ("ddp", "fsdp") if number % 2 == 0 else ("fsdp", "ddp"):
            dist.barrier()
            begun = time.perf_counter()
            trainings[name].step()
            dist.barrier()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _memory(ranks: Ranks, options: dict[str, Any]) -> dict[str, int]:
    """Return the growth of the peak of resident memory since before the model, and the size of the training state."""
    Training(
        options["strategy"], ranks, {**options, "model": "vim2_nano"}
    ).step()  # import everything that is imported on first use
    gc.collect()
    dist.barrier()
    before = _resident("VmRSS")
    resets = _reset_peak()
    training = Training(options["strategy"], ranks, options)
    for _ in range(options["steps"]):
        training.step()
    return {"peak": _resident("VmHWM") - before, "state": training.held(), "peak_was_reset": int(resets)}


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: memory can be measured on Linux only")


def _reset_peak() -> bool:
    """Reset the peak of resident memory to the present value. Return False if this is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(*, model: str, image_size: int, batches: list[int], pairs: int, steps: int) -> Iterator[Figure]:
    for batch in batches:
        yield _time(model, image_size, batch, pairs)
    yield _peak(model, steps)


def _time(model: str, image_size: int, batch: int, pairs: int) -> Figure:
    shared = {"model": model, "image_size": image_size, "batch": batch}
    seconds = in_ranks(_times, {**shared, "pairs": pairs, "warm_up": 1})[0]
    ratios = [a / b for a, b in zip(seconds["fsdp"], seconds["ddp"], strict=True)]
    ddp, fsdp = (statistics.median(seconds[name]) for name in ("ddp", "fsdp"))
    return Figure(
        "fsdp",
        f"FSDP2 / DDP, seconds per step, global batch {batch}",
        **median_of(ratios),
        unit="x",
        target=1.15,
        how=f"{model}, 2 gloo processes of 1 thread, images of {image_size}²; {fsdp:.2f} s of"
        f" {ddp:.2f} s, median of {len(ratios)} pairs",
        detail=seconds,
    )


def _peak(model: str, steps: int) -> Figure:
    tiny = {"model": model, "image_size": 32, "batch": WORLD, "steps": steps}
    found = {name: in_ranks(_memory, {**tiny, "strategy": name}) for name in ("ddp", "fsdp")}
    peak = {name: max(rank["peak"] for rank in ranks) for name, ranks in found.items()}
    state = {name: max(rank["state"] for rank in ranks) for name, ranks in found.items()}
    return Figure(
        "fsdp",
        "peak memory per rank saved by FSDP2 against DDP",
        100 * (1 - peak["fsdp"] / peak["ddp"]),
        "%",
        f"{model}, 1 image of 32² per rank; peak {peak['fsdp'] / 1e6:.0f} MB of {peak['ddp'] / 1e6:.0f} MB above the"
        f" same process without the model; parameters, gradients and moments {state['fsdp'] / 1e6:.0f} of"
        f" {state['ddp'] / 1e6:.0f} MB",
        target=40.0,
        at_least=True,
        detail=found,
    )
