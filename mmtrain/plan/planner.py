"""From a configuration and a cluster to a plan."""

from __future__ import annotations

import math
from dataclasses import replace

from mmtrain.config import RunConfig
from mmtrain.errors import UserError
from mmtrain.plan.cut import cut_batch
from mmtrain.plan.dataset import Dataset, describe_dataset
from mmtrain.plan.gpus import find_gpu
from mmtrain.plan.results import FILL, Plan, Recipe, StrategyPlan
from mmtrain.plan.step import Shape, trace_step
from mmtrain.plan.strategies import Planner

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
