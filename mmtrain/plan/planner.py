"""Plan of a configuration on a cluster: memory, traffic and time of each strategy, and the recommended strategy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from mmtrain.config import STRATEGIES, RunConfig
from mmtrain.errors import UserError
from mmtrain.plan.dataset import describe_dataset
from mmtrain.plan.results import FILL, BatchCut, Plan, StrategyPlan
from mmtrain.plan.roofline import Gpu, find_gpu, step_time
from mmtrain.plan.sharding import fake_group, fsdp_units
from mmtrain.plan.step import Shape, StepCosts, meta_model, trace_step
from mmtrain.plan.strategies import (
    FP32,
    Memory,
    Transfer,
    Workload,
    ddp_transfers,
    fsdp_memory,
    fsdp_transfers,
    replicated_memory,
    zero3_local,
    zero3_memory,
    zero12_memory,
    zero12_padded,
    zero_transfers,
)
from mmtrain.train.build import micro_batches
from mmtrain.train.state import Schedule

#: Largest process group that can be simulated.
MAX_RANKS = 4096


def plan_run(
    config: RunConfig, nodes: int, gpus_per_node: int, gpu: str = "h100", *, samples: int | None = None
) -> Plan:
    """Return the plan of ``config`` on ``nodes`` × ``gpus_per_node`` GPUs, with one rank per GPU.

    Args:
        config: The configuration of the run.
        nodes: Number of nodes.
        gpus_per_node: Number of GPUs per node.
        gpu: Name of the GPU, a key of :data:`mmtrain.plan.roofline.GPUS`.
        samples: Number of training samples per epoch, needed if the data is not on this machine.

    Raises:
        UserError: If the GPU is unknown, or there are fewer than 1 or more than :data:`MAX_RANKS` ranks.
    """
    chosen_gpu = find_gpu(gpu)
    for flag, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if number < 1:
            raise UserError(f"{flag} {number}: must be at least 1")
    world = nodes * gpus_per_node
    if world > MAX_RANKS:
        raise UserError(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: these are {world} ranks, but a plan has at most"
            f" {MAX_RANKS}. Use fewer nodes"
        )
    dataset = describe_dataset(config, samples)
    batch = cut_batch(config, world)
    shape = Shape(batch.samples, getattr(config.data, "image_size", 224), dataset.variates)
    try:
        costs = trace_step(config.model, config.train, shape)
    except ValueError as error:  # the model refuses the shape of its input
        raise UserError(f"model '{config.model.name}': {error}") from None
    planner = _Planner(config, nodes, gpus_per_node, chosen_gpu, costs, batch.micros)
    rows, left_out = planner.rows()
    choice, reason = _choose(rows)
    configured = config.parallel.strategy
    steps = config.train.max_steps if dataset.samples is None else Schedule.of(config, dataset.samples).steps
    return Plan(
        config=config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=chosen_gpu,
        parameters=planner.parameters,
        batch=batch,
        flops=costs.flops * batch.micros * world,
        scan_flops=(costs.forward.scan_flops + costs.backward.scan_flops) * batch.micros * world,
        rows=rows,
        left_out=left_out,
        choice=choice,
        reason=reason,
        advice=[] if choice else _advice(config, batch.samples),
        configured=configured if configured != "auto" else "none" if world == 1 else "ddp",
        dataset=dataset,
        steps=steps,
    )


def cut_batch(config: RunConfig, world: int) -> BatchCut:
    """Return how a run on ``world`` ranks divides its global batch, or the error with which it would refuse to."""
    train = config.train
    batch, most = train.batch_size, train.micro_batch
    try:
        micros = micro_batches(config, world)
        return BatchCut(batch // (world * micros), micros)
    except UserError as error:
        samples = max(batch // (world * train.accumulation), 1)
        return BatchCut(min(samples, most or samples), train.accumulation, f"{error} (the run would be refused)")


@dataclass
class _Planner:
    """Computes the rows of a plan. ``costs`` are those of one micro-batch, ``micros`` the micro-batches per step."""

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
        """The unsharded model on the meta device. It is not changed: FSDP gets its own copy."""
        return meta_model(self.config.model)

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def rows(self) -> tuple[list[StrategyPlan], dict[str, str]]:
        """Return the rows in the order of :data:`STRATEGIES`, and the reasons of strategies without a row."""
        left_out = dict(self._left_out())
        return [self._row(name) for name in STRATEGIES if name not in left_out], left_out

    def _left_out(self) -> Iterator[tuple[str, str]]:
        if self.world > 1:
            yield "none", f"needs a single rank, but there are {self.world}"
        if self.world % self._shards("hsdp"):
            yield "hsdp", f"parallel.shard_size={self._shards('hsdp')} does not divide {self.world} ranks"
        if self.config.train.precision == "fp16":
            for name in ("zero1", "zero2", "zero3"):
                yield name, "does not support train.precision=fp16"

    def _shards(self, name: str) -> int:
        if name != "hsdp":
            return self.world
        return self.config.parallel.shard_size or self.gpus_per_node

    def _row(self, name: str) -> StrategyPlan:
        memory, transfers, local = self._parts(name)
        time = step_time(
            self.costs,
            micros=self.micros,
            tf32=self.config.train.tf32,
            gpu=self.gpu,
            transfers=transfers,
            local=local,
            ema=memory.ema // FP32,
            gathers_in_forward=name in ("fsdp", "hsdp", "zero3"),
        )
        fits = memory.total <= FILL * self.gpu.memory_bytes
        return StrategyPlan(name, memory, sum(t.sent for t in transfers), time, fits)

    def _parts(self, name: str) -> tuple[Memory, list[Transfer], int]:
        """Return memory, transfers, and the number of elements that a rank's optimizer updates."""
        model, world, micros, parallel = self.model, self.world, self.micros, self.config.parallel
        across, reshard = self.nodes > 1, parallel.reshard_after_forward
        ema = self.config.train.ema_decay is not None
        load = Workload(self.parameters, self.costs.kept, self.costs.working, micros, ema)
        if name == "none":
            return replicated_memory(load), [], self.parameters
        if name == "ddp":
            return replicated_memory(load), ddp_transfers(self.parameters, world, across), self.parameters
        if name in ("fsdp", "hsdp"):
            shards = self._shards(name)
            shape = (world // shards, shards) if name == "hsdp" else (world,)
            with fake_group(world):
                units = fsdp_units(meta_model(self.config.model), shape, parallel)
            one_node = shards <= self.gpus_per_node and self.gpus_per_node % shards == 0
            transfers = fsdp_transfers(
                units, world // shards, micros, reshard, across_shards=across and not one_node, across_copies=across
            )
            return fsdp_memory(load, units, reshard), transfers, sum(unit.count * unit.local for unit in units)
        stage = int(name.removeprefix("zero"))
        if stage == 3:
            local = zero3_local(model, world)
            memory, padded = zero3_memory(load, local, parallel.offload, reshard), local * world
        else:
            padded = zero12_padded(model, world)
            memory, local = zero12_memory(load, stage, padded, world, parallel.offload), padded // world
        return memory, zero_transfers(stage, self.parameters, padded, world, micros, across, reshard), local


def _choose(rows: list[StrategyPlan]) -> tuple[str | None, str]:
    """Return the recommended strategy and the reason, or None if no strategy fits.

    It is none or ddp if one of them fits, else the faster of fsdp and hsdp, else the first ZeRO stage that fits.
    """
    fitting = {row.strategy: row for row in rows if row.fits}
    for name in ("none", "ddp"):
        if name in fitting:
            return name, f"it is the simplest strategy and fits into {FILL:.0%} of the memory"
    sharded = [fitting[name] for name in ("fsdp", "hsdp") if name in fitting]
    if sharded:
        best = min(sharded, key=lambda row: row.time.total)
        return best.strategy, "a full replica does not fit" + (
            ", and it is estimated to be the faster of fsdp and hsdp" if len(sharded) > 1 else ""
        )
    for name in ("zero1", "zero2", "zero3"):
        if name in fitting:
            return name, "neither a full replica nor fsdp fits"
    return None, ""


def _advice(config: RunConfig, samples: int) -> list[str]:
    """Return changes of the configuration that lower the memory per rank."""
    train = config.train
    found = [] if train.checkpointing == "full" else ["set train.checkpointing=full"]
    if samples > 1:
        found.append(f"lower the micro-batch with train.micro_batch={max(samples // 2, 1)}")
    if train.precision == "fp32":
        found.append("set train.precision=bf16")
    return [*found, "use GPUs with more memory"]
