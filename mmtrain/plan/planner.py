"""Each strategy's row of the plan: its memory, its traffic, its time.

From a configuration and a cluster to a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from mmtrain.config import STRATEGIES, RunConfig
from mmtrain.errors import UserError
from mmtrain.plan import costs as memory
from mmtrain.plan import costs as wire
from mmtrain.plan.costs import FP32, Transfer, Unit, fake_group, fsdp_units, step_time
from mmtrain.plan.dataset import Dataset, describe_dataset
from mmtrain.plan.gpus import Gpu, find_gpu
from mmtrain.plan.results import FILL, Memory, Plan, Recipe, StrategyPlan, cut_batch
from mmtrain.plan.step import Shape, StepCosts, meta_model, trace_step


@dataclass
class Planner:
    """Plans ``config`` on ``nodes`` × ``gpus_per_node`` × ``gpu``; ``costs`` are those of one of ``micros``
    micro-batches."""

    config: RunConfig
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    costs: StepCosts
    micros: int

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @cached_property
    def model(self) -> nn.Module:
        """The whole model on the meta device, only to be looked at: FSDP splits one of its own."""
        return meta_model(self.config.model)

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def rows(self) -> tuple[list[StrategyPlan], dict[str, str]]:
        """The rows in the order of :data:`STRATEGIES`, and why the missing ones are missing."""
        left_out = dict(self._left_out())
        return [self._row(name) for name in STRATEGIES if name not in left_out], left_out

    def _left_out(self) -> Iterator[tuple[str, str]]:
        if self.world > 1:
            yield "none", f"for one process, and these are {self.world}"
        if self.world % self._shards("hsdp"):
            yield (
                "hsdp",
                f"parallel.shard_size={self._shards('hsdp')} does not divide {self.world} ranks",
            )
        if self.config.train.precision == "fp16":
            for name in ("zero1", "zero2", "zero3"):
                yield name, "train.precision=fp16 is not for DeepSpeed here"

    def _shards(self, name: str) -> int:
        if name != "hsdp":
            return self.world
        return self.config.parallel.shard_size or self.gpus_per_node

    def _row(self, name: str) -> StrategyPlan:
        held, transfers, local = self._parts(name)
        ema = held.ema // FP32
        time = step_time(
            self.costs,
            micros=self.micros,
            tf32=self.config.train.tf32,
            gpu=self.gpu,
            transfers=transfers,
            local=local,
            ema=ema,
            gathers_in_forward=name in ("fsdp", "hsdp", "zero3"),
        )
        fits = held.total <= FILL * self.gpu.memory_bytes
        return StrategyPlan(name, held, sum(t.sent for t in transfers), time, fits)

    def _parts(self, name: str) -> tuple[Memory, list[Transfer], int]:
        """Memory, transfers, and the elements that a rank's optimizer updates."""
        load = memory.workload(self.config, self.parameters, self.costs.kept, self.costs.working, self.micros)
        if name in ("none", "ddp"):
            transfers = wire.ddp_transfers(self.parameters, self.world, self.nodes > 1) if name == "ddp" else []
            return memory.replicated_memory(load), transfers, self.parameters
        if name in ("fsdp", "hsdp"):
            return self._fsdp_parts(name, load)
        return self._zero_parts(int(name[-1]), load)

    def _fsdp_parts(self, name: str, load: memory.Workload) -> tuple[Memory, list[Transfer], int]:
        units = self._units(name)
        shards = self._shards(name)
        reshard = self.config.parallel.reshard_after_forward
        transfers = wire.fsdp_transfers(
            units,
            self.world // shards,
            self.micros,
            reshard,
            across_shards=self.nodes > 1 and bool(shards > self.gpus_per_node or self.gpus_per_node % shards),
            across_copies=self.nodes > 1,
        )
        local = sum(unit.count * unit.local for unit in units)
        return memory.fsdp_memory(load, units, reshard), transfers, local

    def _units(self, name: str) -> list[Unit]:
        shards = self._shards(name)
        shape = (self.world // shards, shards) if name == "hsdp" else (self.world,)
        with fake_group(self.world):
            return fsdp_units(meta_model(self.config.model), shape, self.config.parallel)

    def _zero_parts(self, stage: int, load: memory.Workload) -> tuple[Memory, list[Transfer], int]:
        model, world, spread = self.model, self.world, self.config.parallel
        offload, reshard = spread.offload, spread.reshard_after_forward
        if stage == 3:
            local = memory.zero3_local(model, world)
            held, padded = memory.zero3_memory(load, local, offload, reshard), local * world
        else:
            padded = memory.zero12_padded(model, world)
            local = padded // world
            held = memory.zero12_memory(load, stage, padded, world, offload)
        transfers = wire.zero_transfers(stage, self.parameters, padded, world, self.micros, self.nodes > 1, reshard)
        return held, transfers, local


#: The largest process group that is simulated.
MAX_RANKS = 4096


def plan_run(
    config: RunConfig, nodes: int, gpus_per_node: int, gpu: str = "h100", *, samples: int | None = None
) -> Plan:
    """Plan ``config`` on ``nodes`` × ``gpus_per_node`` GPUs called ``gpu``, one rank a GPU, in this process.

    Args:
        samples: training samples of an epoch, where the data is not at hand.

    Raises:
        UserError: for an unknown GPU, or fewer than 1 or more than :data:`MAX_RANKS` ranks.
    """
    chosen_gpu = find_gpu(gpu)
    for flag, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if number < 1:
            raise UserError(f"{flag} {number}: give 1 or more")
    world = nodes * gpus_per_node
    if world > MAX_RANKS:
        raise UserError(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: that is {world} ranks; up to {MAX_RANKS} are planned"
        )
    dataset = describe_dataset(config, samples)
    batch = cut_batch(config, world)
    shape = Shape(batch.samples, getattr(config.data, "image_size", 224), dataset.variates)
    try:
        costs = trace_step(config.model, config.train, shape)
    except ValueError as error:  # the model's word on its input
        raise UserError(f"model '{config.model.name}': {error}") from None
    planner = Planner(config, nodes, gpus_per_node, chosen_gpu, costs, batch.micros)
    rows, left_out = planner.rows()
    choice, reason = _choose(rows)
    asked = config.parallel.strategy
    plan = Plan(
        name=config.name,
        model=config.model.name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=chosen_gpu,
        precision=config.train.precision,
        checkpointing=config.train.checkpointing,
        parameters=planner.parameters,
        batch=batch,
        flops=costs.flops * batch.micros * world,
        scan_flops=(costs.forward.scan_flops + costs.backward.scan_flops) * batch.micros * world,
        rows=rows,
        left_out=left_out,
        choice=choice,
        reason=reason,
        advice=[] if choice else _advice(config, batch.samples),
        configured=asked if asked != "auto" else "none" if world == 1 else "ddp",
        dataset=dataset,
        recipe=None,
    )
    return _with_recipe(plan, config, dataset)


def _choose(rows: list[StrategyPlan]) -> tuple[str | None, str]:
    """The simplest that fits: none or ddp; else the faster of fsdp and hsdp; else the first stage of ZeRO that does."""
    fitting = {row.strategy: row for row in rows if row.fits}
    for name in ("none", "ddp"):
        if name in fitting:
            return name, f"it is the simplest, and fits into {FILL:.0%} of the memory"
    sharded = [fitting[name] for name in ("fsdp", "hsdp") if name in fitting]
    if sharded:
        best = min(sharded, key=lambda row: row.time.total)
        return best.strategy, "a whole copy does not fit" + (
            ", and of fsdp and hsdp it is estimated the faster" if len(sharded) > 1 else ""
        )
    for name in ("zero1", "zero2", "zero3"):
        if name in fitting:
            return name, "neither a whole copy nor fsdp fits"
    return None, ""


def _advice(config: RunConfig, samples: int) -> list[str]:
    train = config.train
    found = [] if train.checkpointing == "full" else ["set train.checkpointing=full"]
    if samples > 1:
        found.append(f"take fewer samples at once with train.micro_batch={max(samples // 2, 1)}")
    if train.precision == "fp32":
        found.append("set train.precision=bf16")
    return [*found, "use GPUs with more memory"]


def _with_recipe(plan: Plan, config: RunConfig, dataset: Dataset) -> Plan:
    """``plan`` with its days and hours, where the length of an epoch is known, or the number of steps is given."""
    most = config.train.max_steps
    if dataset.samples is None and most is None:
        return plan
    steps = math.inf
    if dataset.samples is not None:
        # as mmtrain.train.state.Schedule counts them
        steps = math.ceil(config.train.epochs * dataset.samples / config.train.batch_size)
    steps = int(min(steps, most) if most is not None else steps)
    seconds = steps * plan.basis.time.total
    return replace(plan, recipe=Recipe(steps, seconds / 86400, seconds / 3600 * plan.world))
