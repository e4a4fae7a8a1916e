"""Each strategy's row of the plan: its memory, its traffic, its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from mmtrain.config import STRATEGIES, RunConfig
from mmtrain.plan import memory, wire
from mmtrain.plan.clock import step_time
from mmtrain.plan.fake import fake_group
from mmtrain.plan.gpus import Gpu
from mmtrain.plan.results import FILL, Memory, StrategyPlan
from mmtrain.plan.shard import Unit, fsdp_units
from mmtrain.plan.step import StepCosts, meta_model
from mmtrain.plan.wire import FP32, Transfer


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
