"""Which strategy a run uses: choose it by name, check the configuration against it, and make it."""

from __future__ import annotations

from torch import nn

from mmtrain.config import ParallelConfig, RunConfig
from mmtrain.errors import UserError
from mmtrain.parallel.fsdp import FSDPStrategy
from mmtrain.parallel.strategy import DDPStrategy, Strategy, StrategyOptions, TorchStrategy
from mmtrain.parallel.zero import ZeroStrategy, require_deepspeed


def strategy_name(config: ParallelConfig, world: int) -> str:
    """The name of the strategy, with ``auto`` resolved.

    Raises:
        UserError: for ``none`` in several processes.
    """
    if config.strategy == "auto":
        return "none" if world == 1 else "ddp"
    if config.strategy == "none" and world > 1:
        raise UserError(
            f"parallel.strategy is 'none', but there are {world} processes, which would train {world} models apart:"
            " use ddp, fsdp, hsdp, zero1, zero2 or zero3"
        )
    return config.strategy


def needs_group(config: ParallelConfig, world: int) -> bool:
    """Whether the strategy wants a process group even in one process."""
    return strategy_name(config, world) not in ("none", "ddp")


def check_strategy(config: RunConfig, world: int) -> None:
    """Refuse what a strategy cannot do, before anything is built.

    Raises:
        UserError: naming the key and the cure.
    """
    name = strategy_name(config.parallel, world)
    if config.parallel.gather == "bf16":
        if name not in ("fsdp", "hsdp"):
            raise UserError(f"parallel.gather is 'bf16', which is for fsdp and hsdp, not {name}: set it to fp32")
        if config.train.precision != "bf16":
            raise UserError(
                f"parallel.gather is 'bf16', but train.precision is '{config.train.precision}': weights would be"
                " rounded for nothing; set parallel.gather=fp32, or train.precision=bf16"
            )
    if not name.startswith("zero"):
        return
    require_deepspeed()
    if config.train.precision == "fp16":
        raise UserError("train.precision is 'fp16', which zero1, zero2 and zero3 do not take here: use bf16, or fsdp")
    if name == "zero3" and config.train.checkpointing == "selective":
        raise UserError(
            "train.checkpointing is 'selective', which zero3 does not go with, since its gathers fall among the"
            " operations that are chosen from: use full, or fsdp"
        )
    if config.train.compile:
        raise UserError("train.compile is true, which DeepSpeed's hooks do not go with: use fsdp, or false")


def build_strategy(model: nn.Module, options: StrategyOptions) -> Strategy:
    """Split ``model``, which is on the meta device, and give it memory; its values are not set yet."""
    name = strategy_name(options.config, options.ranks.world)
    if name.startswith("zero"):
        return ZeroStrategy(model, options, stage=int(name[-1]))
    if name in ("fsdp", "hsdp"):
        return FSDPStrategy(model, options)
    return TorchStrategy(model, options) if options.ranks.world == 1 else DDPStrategy(model, options)
