"""``mmtrain plan``: what a run would need, before it is started."""

from __future__ import annotations

from typing import Annotated

import typer

from mmtrain.cli.options import Config, Overrides


def plan_command(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes (default: cluster.nodes).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs a node (default: cluster.gpus_per_node).")] = None,
    gpu: Annotated[str | None, typer.Option(help="Which GPU, such as h100 (default: cluster.gpu).")] = None,
    samples: Annotated[int | None, typer.Option(help="Training samples, where the data is not at hand.")] = None,
) -> None:
    """Plan a run without any GPU: memory, traffic and step time under each strategy, data rate, GPU-hours."""
    from rich.console import Console

    from mmtrain.config import load_config
    from mmtrain.plan import plan_run
    from mmtrain.plan.report import render

    resolved = load_config(config, overrides or [])
    cluster = resolved.cluster
    plan = plan_run(
        resolved,
        cluster.nodes if nodes is None else nodes,
        cluster.gpus_per_node if gpus_per_node is None else gpus_per_node,
        cluster.gpu if gpu is None else gpu,
        samples=samples,
    )
    console = Console()
    print(render(plan, console.width if console.is_terminal else 120))
