"""Result of a plan as data and as text. Sizes are in bytes, times in seconds."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mmtrain.config import RunConfig
from mmtrain.plan.dataset import Dataset
from mmtrain.plan.roofline import ASSUMPTIONS, Gpu, StepTime
from mmtrain.plan.strategies import Memory

#: Share of a GPU's memory that a plan may fill. The rest is reserved for memory that the plan does not count: the CUDA
#: context, NCCL buffers, kernel workspaces, and the allocator's fragmentation.
FILL = 0.9
#: Another strategy is suggested if its estimated step time is below this fraction of the recommended one's.
_MUCH_FASTER = 0.85
_GIB, _MB = 2**30, 1e6


@dataclass(frozen=True)
class BatchCut:
    """Division of the global batch.

    Attributes:
        samples: Samples per rank and micro-batch.
        micros: Micro-batches per step.
        problem: Why a run would refuse this batch, or "". If there is a problem, ``samples`` is the share of a rank
            rounded down, at least 1, and the plan is computed for it.
    """

    samples: int
    micros: int
    problem: str = ""


@dataclass(frozen=True)
class StrategyPlan:
    """One row of the table. ``wire`` is the number of bytes that a rank sends per step."""

    strategy: str
    memory: Memory
    wire: float
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Recipe:
    """Cost of the whole run of ``steps`` steps."""

    steps: int
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """Plan of a run.

    Attributes:
        config: The configuration of the run.
        nodes: Number of nodes.
        gpus_per_node: Number of GPUs, and of ranks, per node.
        gpu: The kind of GPU.
        parameters: Number of parameters of the model.
        batch: Division of the global batch.
        flops: FLOPs of one step over the global batch: forward, backward and recomputation.
        scan_flops: Part of ``flops`` in selective scans.
        rows: One row per strategy that can run.
        left_out: Reasons of the strategies that cannot run.
        choice: The recommended strategy, or None if no strategy fits.
        reason: Reason for ``choice``.
        advice: Changes of the configuration to make if no strategy fits.
        configured: The strategy that the configuration sets.
        dataset: Size of the training split.
        steps: Steps of the whole run, or None if the length of an epoch is unknown.
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
        """The row used for rates and times: that of the configured strategy, else that of the recommended one."""
        row = self.row(self.configured) or self.row(self.choice or "")
        return row or self.rows[0]

    @property
    def samples(self) -> int:
        """Samples per step. This is the global batch, unless it is not divisible by the number of ranks."""
        return self.batch.samples * self.batch.micros * self.world

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.basis.time.total

    @property
    def recipe(self) -> Recipe | None:
        """Days and GPU-hours of the run, or None if the number of steps is unknown."""
        if self.steps is None:
            return None
        seconds = self.steps * self.basis.time.total
        return Recipe(self.steps, seconds / 86400, seconds / 3600 * self.world)

    @property
    def warnings(self) -> list[str]:
        """Reasons not to submit the run: a batch that would be refused, or too little memory."""
        found = [self.batch.problem] if self.batch.problem else []
        configured = self.row(self.configured)
        gib = f"{self.gpu.memory:g} GiB of a {self.gpu.name}"
        if self.choice is None:
            found.append(f"no strategy fits into {FILL:.0%} of the {gib}: {'; '.join(self.advice)}")
        elif configured is not None and not configured.fits:
            found.append(
                f"parallel.strategy={self.configured} needs about {configured.memory.total / _GIB:.1f} GiB per rank,"
                f" more than {FILL:.0%} of the {gib}: use parallel.strategy={self.choice}"
            )
        elif configured is None:
            found.append(f"parallel.strategy={self.configured}: {self.left_out.get(self.configured, 'not planned')}")
        return found


def render(plan: Plan, width: int = 120) -> str:
    """Return the plan as text: a table with one row per strategy, followed by the recommendation and the estimates."""
    heading = (
        f"{plan.config.name}: {plan.config.model.name} on {plan.nodes} × {plan.gpus_per_node} × {plan.gpu.name}"
        f" ({plan.gpu.memory:g} GiB), GiB per rank"
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
    """Format a size in GiB with enough digits that small parts are not shown as 0."""
    gib = size / _GIB
    return f"{gib:.2f}" if gib >= 1 or size == 0 else f"{gib:.3f}" if gib >= 0.1 else f"{gib:.2g}"


def _lines(plan: Plan) -> list[str]:
    batch, train = plan.batch, plan.config.train
    lines = [f"NOTE: {batch.problem}. The estimate assumes {batch.samples} samples."] if batch.problem else []
    lines += [f"left out: {name}: {why}" for name, why in plan.left_out.items()]
    lines += [
        f"model: {plan.parameters / 1e6:.2f} M parameters; forward and backward of a step of {plan.samples} samples"
        f" take {_flops(plan.flops)} ({plan.scan_flops / max(plan.flops, 1):.0%} in scans)",
        f"batch: {plan.samples} = {plan.world} ranks × {batch.micros} micro-batch{'' if batch.micros == 1 else 'es'} ×"
        f" {batch.samples} samples; precision {train.precision}, recomputation (checkpointing) {train.checkpointing}",
        _choice(plan),
    ]
    basis = plan.basis
    strategy = f" (with {basis.strategy})"
    rate = plan.samples_per_second
    data = plan.dataset
    lines.append(
        f"data rate{strategy}: {rate:,.0f} samples/s, {rate * data.stored / _MB:,.0f} MB/s read"
        f" ({data.stored / 1e3:,.0f} kB per sample, {data.bytes_origin}), {rate * data.decoded / _MB:,.0f} MB/s decoded"
        f" ({data.form}), in total over {plan.nodes} node{'' if plan.nodes == 1 else 's'}"
    )
    lines.append(_recipe(plan, strategy))
    time = basis.time
    lines.append(
        f"est. step{strategy}: {time.compute * 1e3:,.1f} ms forward and backward, {time.optimizer * 1e3:,.1f} ms"
        f" optimizer, {time.exposed * 1e3:,.1f} ms waiting for {time.communication * 1e3:,.1f} ms of communication"
    )
    lines.append(
        f"This is a roofline estimate, never measured ({plan.gpu.source}; links: {plan.gpu.links},"
        f" {plan.gpu.intra:g} and {plan.gpu.inter:g} GB/s). Assumptions:"
    )
    lines += [f"- {text};" for text in ASSUMPTIONS]
    lines.append(
        f"- memory does not include the CUDA context, workspaces and fragmentation: a plan fits if it fills at most"
        f" {FILL:.0%} of the GPU."
    )
    return lines


def _choice(plan: Plan) -> str:
    if plan.choice is None:
        return f"recommended strategy: none, because no strategy fits: {', or '.join(plan.advice)}"
    text = f"recommended strategy: {plan.choice}, because {plan.reason}"
    if plan.configured != plan.choice:
        text += f" (the configuration sets {plan.configured})"
    chosen, best = plan.row(plan.choice), min((row for row in plan.rows if row.fits), key=lambda row: row.time.total)
    if chosen is not None and best.time.total < _MUCH_FASTER * chosen.time.total:
        times = chosen.time.total / best.time.total
        text += f"; also try {best.strategy}, which is estimated to be {times:.1f}× as fast"
    return text


def _recipe(plan: Plan, strategy: str) -> str:
    data, recipe = plan.dataset, plan.recipe
    if recipe is None:
        return f"whole run: unknown; samples per epoch: {data.origin}"
    known = f"{data.samples:,} samples per epoch, {data.origin}" if data.samples else f"epoch: {data.origin}"
    return (
        f"whole run{strategy}: {recipe.steps:,} steps, about {_days(recipe.days)} and {recipe.gpu_hours:,.2f} GPU-hours"
        f" ({known})"
    )


def _days(days: float) -> str:
    return f"{days:.2f} days" if days >= 0.1 else f"{days * 1440:.1f} minutes"


def _flops(flops: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops / 1e9:.2f} GFLOP"
