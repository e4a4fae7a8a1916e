"""A plan as text."""

from __future__ import annotations

import io

from mmtrain.plan.costs import ASSUMPTIONS
from mmtrain.plan.results import FILL, Plan, StrategyPlan

_GIB, _MB = 2**30, 1e6
#: Estimates that differ by less are not worth telling apart.
_MUCH_FASTER = 0.85


def render(plan: Plan, width: int = 120) -> str:
    """The table, a row a strategy, and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    heading = (
        f"{plan.name}: {plan.model} on {plan.nodes} × {plan.gpus_per_node} × {plan.gpu.name}"
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
    batch = plan.batch
    lines = [f"NOTE: {batch.problem}. The figures are for {batch.samples} samples."] if batch.problem else []
    lines += [f"left out: {name}: {why}" for name, why in plan.left_out.items()]
    lines += [
        f"model: {plan.parameters / 1e6:.2f} M parameters; a step of {plan.samples} samples takes {_flops(plan.flops)}"
        f" ({plan.scan_flops / max(plan.flops, 1):.0%} in scans), forward and backward",
        f"batch: {plan.samples} = {plan.world} ranks × {batch.micros} {_times(batch.micros)} × {batch.samples} samples;"
        f" precision {plan.precision}, checkpointing {plan.checkpointing}",
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


def _times(micros: int) -> str:
    return "micro-batch" if micros == 1 else "micro-batches"


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
