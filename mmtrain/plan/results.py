"""What a plan says, as data and as text. Sizes in bytes, times in seconds."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mmtrain.config import RunConfig
from mmtrain.plan.dataset import Dataset
from mmtrain.plan.roofline import ASSUMPTIONS, Gpu, StepTime
from mmtrain.plan.strategies import Memory

#: The share of a GPU's memory that a plan may fill. The rest is for what it does not count: the CUDA context, buffers
#: of NCCL, workspaces of kernels, and what the allocator loses to fragmentation.
FILL = 0.9
#: Estimates that differ by less are not worth telling apart.
_MUCH_FASTER = 0.85
_GIB, _MB = 2**30, 1e6


@dataclass(frozen=True)
class BatchCut:
    """``samples`` a rank and micro-batch, ``micros`` micro-batches a step.

    ``problem``: why a run would refuse this batch, or ""; the plan is then one of ``samples`` all the same, which is
    the share rounded down, but at least 1.
    """

    samples: int
    micros: int
    problem: str = ""


@dataclass(frozen=True)
class StrategyPlan:
    """One row. ``wire``: bytes that a rank sends in a step."""

    strategy: str
    memory: Memory
    wire: float
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Recipe:
    """The whole run: ``steps`` of the global batch."""

    steps: int
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """A run of ``config`` on ``nodes`` × ``gpus_per_node`` × ``gpu``.

    ``flops`` and ``scan_flops``: of one step over the whole global batch, forward and backward, with what is
    recomputed. ``choice``: the strategy that would be chosen, or None where none fits; ``reason`` and ``advice`` say
    why, and what to change. ``configured``: what the configuration asks for. ``steps``: of the whole run, None where
    the length of an epoch is not known.
    """

    config: RunConfig
    nodes: int
    gpus_per_node: int
    gpu: Gpu
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
    steps: int | None

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
    def recipe(self) -> Recipe | None:
        """Days and GPU-hours, where the number of steps is known."""
        if self.steps is None:
            return None
        seconds = self.steps * self.basis.time.total
        return Recipe(self.steps, seconds / 86400, seconds / 3600 * self.world)

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
                f"parallel.strategy={self.configured} needs about {mine.memory.total / _GIB:.1f} GiB a rank, more than"
                f" {FILL:.0%} of the {gib}: use parallel.strategy={self.choice}"
            )
        elif mine is None:
            found.append(f"parallel.strategy={self.configured}: {self.left_out.get(self.configured, 'not planned')}")
        return found


def render(plan: Plan, width: int = 120) -> str:
    """The table, a row a strategy, and what follows from it."""
    heading = (
        f"{plan.config.name}: {plan.config.model.name} on {plan.nodes} × {plan.gpus_per_node} × {plan.gpu.name}"
        f" ({plan.gpu.memory:g} GiB), GiB a rank"
    )
    table = Table("strategy", box=None, title=heading, title_justify="left", pad_edge=False)
    columns = ("weights", "gradients", "optimizer", "EMA", "activations", "transient", "total", "fits")
    for column in (*columns, "wire MB/step", "est. step ms"):
        table.add_column(column, justify="right")
    for row in plan.rows:
        table.add_row(*_cells(row))
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, color_system=None).print(table)
    table_lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([*table_lines, "", *_lines(plan)])


def _cells(row: StrategyPlan) -> tuple[str, ...]:
    m = row.memory
    parts = (m.weights, m.gradients, m.optimizer, m.ema, m.activations, m.transient, m.total)
    sizes = [_gib(size) for size in parts]
    return (row.strategy, *sizes, "yes" if row.fits else "NO", f"{row.wire / _MB:,.0f}", f"{row.time.total * 1e3:,.0f}")


def _gib(size: int) -> str:
    """GiB with three digits at least, so that the thousandth part of a model is not 0."""
    gib = size / _GIB
    return f"{gib:.2f}" if gib >= 1 or size == 0 else f"{gib:.3f}" if gib >= 0.1 else f"{gib:.2g}"


def _lines(plan: Plan) -> list[str]:
    batch, train = plan.batch, plan.config.train
    lines = [f"NOTE: {batch.problem}. The figures are for {batch.samples} samples."] if batch.problem else []
    lines += [f"left out: {name}: {why}" for name, why in plan.left_out.items()]
    lines += [
        f"model: {plan.parameters / 1e6:.2f} M parameters; a step of {plan.samples} samples takes {_flops(plan.flops)}"
        f" ({plan.scan_flops / max(plan.flops, 1):.0%} in scans), forward and backward",
        f"batch: {plan.samples} = {plan.world} ranks × {batch.micros} micro-batch{'' if batch.micros == 1 else 'es'} ×"
        f" {batch.samples} samples; precision {train.precision}, checkpointing {train.checkpointing}",
        _choice(plan),
    ]
    basis = plan.basis
    told = f" (with {basis.strategy})"
    rate = plan.samples_per_second
    data = plan.dataset
    lines.append(
        f"data rate{told}: {rate:,.0f} samples/s, {rate * data.stored / _MB:,.0f} MB/s to read"
        f" ({data.stored / 1e3:,.0f} kB a sample: {data.bytes_origin}), {rate * data.decoded / _MB:,.0f} MB/s decoded"
        f" ({data.form}); a node needs 1/{plan.nodes} of it"
    )
    lines.append(_recipe(plan, told))
    time = basis.time
    lines.append(
        f"est. step{told}: {time.compute * 1e3:,.1f} ms computing, {time.optimizer * 1e3:,.1f} ms updating,"
        f" {time.exposed * 1e3:,.1f} ms waiting for {time.communication * 1e3:,.1f} ms of communication"
    )
    lines.append(
        f"An estimate by a roofline, never measured ({plan.gpu.source}; links: {plan.gpu.links},"
        f" {plan.gpu.intra:g} and {plan.gpu.inter:g} GB/s):"
    )
    lines += [f"- {text};" for text in ASSUMPTIONS]
    lines.append(
        f"- memory leaves out the CUDA context, workspaces and fragmentation: a plan fits up to {FILL:.0%} of the GPU."
    )
    return lines


def _choice(plan: Plan) -> str:
    if plan.choice is None:
        return f"would choose: none of these, since none fits: {', or '.join(plan.advice)}"
    text = f"would choose: {plan.choice}, since {plan.reason}"
    if plan.configured != plan.choice:
        text += f" (the configuration asks for {plan.configured})"
    chosen, best = plan.row(plan.choice), min((row for row in plan.rows if row.fits), key=lambda row: row.time.total)
    if chosen is not None and best.time.total < _MUCH_FASTER * chosen.time.total:
        times = chosen.time.total / best.time.total
        text += f"; try {best.strategy} against it: by the estimate it is {times:.1f}× as fast"
    return text


def _recipe(plan: Plan, told: str) -> str:
    data, recipe = plan.dataset, plan.recipe
    if recipe is None:
        return f"days: unknown; samples of an epoch: {data.origin}"
    known = f"{data.samples:,} samples an epoch, {data.origin}" if data.samples else f"epoch: {data.origin}"
    return (
        f"recipe{told}: {recipe.steps:,} steps, about {_days(recipe.days)} and {recipe.gpu_hours:,.2f} GPU-hours"
        f" ({known})"
    )


def _days(days: float) -> str:
    return f"{days:.2f} days" if days >= 0.1 else f"{days * 1440:.1f} minutes"


def _flops(flops: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops / 1e9:.2f} GFLOP"
