"""From a task and a configuration to a model spread over the ranks, its values not set yet."""

from __future__ import annotations

import torch
from torch import nn

from mmtrain.config import RunConfig
from mmtrain.models.averaging import model_blocks
from mmtrain.parallel.build import build_strategy
from mmtrain.parallel.ranks import Ranks
from mmtrain.parallel.strategy import Plan, Strategy
from mmtrain.tasks import Task
from mmtrain.train.activations import checkpoint_activations
from mmtrain.train.micro_batches import micro_batches
from mmtrain.train.optim import build_optimizer
from mmtrain.train.precision import autocast_dtype


def spread_model(config: RunConfig, task: Task, ranks: Ranks) -> Strategy:
    """Build the model of ``task`` on the meta device, compile and split it as configured, and give it memory."""
    model = blueprint(task)
    checkpoint_activations(model, config.train)
    blocks = model_blocks(model)
    if config.train.compile:
        for block in blocks:
            block.compile()
    parts = micro_batches(config, ranks.world)
    plan = Plan(
        ranks,
        config.parallel,
        blocks,
        lambda split: build_optimizer(split, config.optim),
        autocast=autocast_dtype(config.train),
        micro_batches=parts,
        micro_batch_size=config.train.batch_size // (ranks.world * parts),
        plain=not config.train.compile and config.train.checkpointing == "none",
    )
    return build_strategy(model, plan)


def blueprint(task: Task) -> nn.Module:
    """The model of ``task`` on the meta device: shapes without memory."""
    with torch.device("meta"):
        return task.build_model()
