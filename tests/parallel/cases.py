"""A case: one training run of the matrix, and the configuration that it stands for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from mmtrain.config import RunConfig, replace

WORLDS = (1, 2, 4)
SPLITTING = ("fsdp", "hsdp", "zero1", "zero2", "zero3")
STEPS = 20
#: Every run evaluates, and so saves, here: a resumed one starts from it.
HALF = 10


@dataclass(frozen=True)
class Case:
    """``model`` names a base configuration; ``changes`` are (dotted key, value).

    ``start``: the run whose checkpoint of step :data:`HALF` this one goes on from.
    """

    model: str
    strategy: str = "none"
    world: int = 1
    changes: tuple[tuple[str, Any], ...] = ()
    start: Case | None = None

    def __str__(self) -> str:
        changed = "".join(f"-{key.split('.')[-1]}={value}" for key, value in self.changes)
        start = f"-after-{self.start.strategy}{self.start.world}" if self.start else ""
        return f"{self.model}-{self.strategy}{self.world}{changed}{start}"

    @property
    def alone(self) -> Case:
        """What this run is compared with: one process, no accumulation, nothing recomputed or compiled."""
        how = ("train.accumulation", "train.checkpointing", "train.compile", "parallel.gather", "parallel.offload")
        return Case(self.model, changes=tuple(change for change in self.changes if change[0] not in how))

    def configure(self, base: RunConfig) -> RunConfig:
        """``base`` with all that makes this case."""
        config = copy.deepcopy(base)
        config.parallel = replace(config.parallel, strategy=self.strategy, shard_size=self._shard_size())
        for key, value in self.changes:
            section, name = key.split(".")
            setattr(config, section, replace(getattr(config, section), **{name: value}))
        return config

    def _shard_size(self) -> int | None:
        """HSDP splits over two ranks and replicates over the rest: 1 × 1, 1 × 2 and 2 × 2."""
        return min(2, self.world) if self.strategy == "hsdp" else None


def strategies(world: int) -> list[str]:
    """All strategies, where one process has no data-parallel one."""
    return ["none" if world == 1 else "ddp", *SPLITTING]


def matrix(model: str, worlds: tuple[int, ...] = WORLDS, *changes: tuple[str, Any]) -> list[Case]:
    """``model`` under every strategy on each of ``worlds``."""
    return [Case(model, strategy, world, changes) for world in worlds for strategy in strategies(world)]
