"""How the global batch falls on ranks and micro-batches, and what to say where it does not.

What a plan says, as data. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.plan.dataset import Dataset
from mmtrain.plan.gpus import Gpu
from mmtrain.train.build import micro_batches


@dataclass(frozen=True)
class BatchCut:
    """``samples`` a rank and micro-batch, ``micros`` micro-batches a step.

    ``problem``: why a run would refuse this batch, or ""; the plan is then one of ``samples`` all the same, which is
    the share rounded down, but at least 1.
    """

    total: int
    samples: int
    micros: int
    problem: str = ""


def cut_batch(config: RunConfig, world: int) -> BatchCut:
    """How a run on ``world`` ranks would cut its batch; with the words by which it would refuse to."""
    train = config.train
    batch, most = train.batch_size, train.micro_batch
    try:
        micros = micro_batches(config, world)
        return BatchCut(batch, batch // (world * micros), micros)
    except UserError as error:
        samples = max(batch // (world * train.accumulation), 1)
        return BatchCut(batch, min(samples, most or samples), train.accumulation, f"{error} (the run would be refused)")


#: The share of a GPU's memory that a plan may fill. The rest is for what it does not count: the CUDA context, buffers
#: of NCCL, workspaces of kernels, and what the allocator loses to fragmentation.
FILL = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    ``activations``: what one micro-batch keeps for its backward pass. ``transient``: what comes and goes: gathered
    parameters, buckets, results under way; taken as if all of it came at once, in the fullest moment.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    transient: int

    @property
    def state(self) -> int:
        """What is there between steps, and the gradients."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StepTime:
    """An estimate. ``communication`` in all, ``exposed`` of it not hidden behind computation."""

    compute: float
    optimizer: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.exposed


@dataclass(frozen=True)
class StrategyPlan:
    """One row. ``wire``: bytes that a rank sends in a step. ``problem``: why the strategy cannot be used, or ""."""

    strategy: str
    memory: Memory
    wire: float
    time: StepTime
    fits: bool
    problem: str = ""


@dataclass(frozen=True)
class Recipe:
    """The whole run: ``steps`` of the global batch."""

    steps: int
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """A run of configuration ``name`` on ``nodes`` × ``gpus_per_node`` × ``gpu``.

    ``flops`` and ``scan_flops``: of one step over the whole global batch, forward and backward, with what is
    recomputed. ``choice``: the strategy that would be chosen, or None where none fits; ``reason`` and ``advice`` say
    why, and what to change. ``configured``: what the configuration asks for.
    """

    name: str
    model: str
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    precision: str
    checkpointing: str
    parameters: int
    batch: BatchCut
    flops: int
    scan_flops: int
    rows: list[StrategyPlan]
    left_out: dict[str, str]
    choice: str | None
    reason: str
    advice: list[str]
    configured: str
    dataset: Dataset
    recipe: Recipe | None

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def row(self, strategy: str) -> StrategyPlan | None:
        return next((row for row in self.rows if row.strategy == strategy), None)

    @property
    def basis(self) -> StrategyPlan:
        """The row that rates, days and hours are told for: the configured strategy's, else the choice's."""
        row = self.row(self.configured) or self.row(self.choice or "")
        return row or self.rows[0]

    @property
    def samples(self) -> int:
        """Those of a step as planned: the global batch, unless the ranks do not divide it."""
        return self.batch.samples * self.batch.micros * self.world

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.basis.time.total

    @property
    def warnings(self) -> list[str]:
        """What should keep one from submitting the run."""
        found = [self.batch.problem] if self.batch.problem else []
        mine = self.row(self.configured)
        gib = f"{self.gpu.memory:g} GiB of a {self.gpu.name}"
        if self.choice is None:
            found.append(f"no strategy fits into {FILL:.0%} of the {gib}: {'; '.join(self.advice)}")
        elif mine is not None and not mine.fits:
            found.append(
                f"parallel.strategy={self.configured} needs about {mine.memory.total / 2**30:.1f} GiB a rank, more than"
                f" {FILL:.0%} of the {gib}: use parallel.strategy={self.choice}"
            )
        elif mine is None:
            found.append(f"parallel.strategy={self.configured}: {self.left_out.get(self.configured, 'not planned')}")
        return found
