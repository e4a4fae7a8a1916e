"""Choose the strategy of a run, check that the configuration works with it, and build it."""

from __future__ import annotations

from torch import nn

from mmtrain.config import ParallelConfig, RunConfig
from mmtrain.errors import UserError
from mmtrain.parallel.fsdp import FSDPStrategy
from mmtrain.parallel.strategy import DDPStrategy, Strategy, StrategyOptions, TorchStrategy
from mmtrain.parallel.zero import ZeroStrategy, require_deepspeed


def strategy_name(config: ParallelConfig, world: int) -> str:
    """Return the name of the strategy, with ``auto`` resolved to ``none`` (one rank) or ``ddp``.

    Raises:
        UserError: if the strategy is ``none`` but there are several ranks.
    """
    if config.strategy == "auto":
        return "none" if world == 1 else "ddp"
    if config.strategy == "none" and world > 1:
        raise UserError(
            f"parallel.strategy=none: the {world} ranks would train {world} independent models."
            " Use ddp, fsdp, hsdp, zero1, zero2 or zero3"
        )
    return config.strategy


def needs_group(config: ParallelConfig, world: int) -> bool:
    """Return whether the strategy needs a process group even for a single rank."""
    return strategy_name(config, world) not in ("none", "ddp")


def check_strategy(config: RunConfig, world: int) -> None:
    """Check that the strategy supports the configuration.

    Raises:
        UserError: if it does not, with the key and the cure.
    """
    name = strategy_name(config.parallel, world)
    if config.parallel.gather == "bf16":
        if name not in ("fsdp", "hsdp"):
            raise UserError(f"parallel.gather=bf16: supported by fsdp and hsdp only, not by {name}. Set it to fp32")
        if config.train.precision != "bf16":
            raise UserError(
                f"parallel.gather=bf16 needs train.precision=bf16, but train.precision is '{config.train.precision}'."
                " Set parallel.gather=fp32 or train.precision=bf16"
            )
    if not name.startswith("zero"):
        return
    require_deepspeed()
    if config.train.precision == "fp16":
        raise UserError(
            f"train.precision=fp16: not supported with {name}. Use train.precision=bf16 or parallel.strategy=fsdp"
        )
    if name == "zero3" and config.train.checkpointing == "selective":
        raise UserError(
            "train.checkpointing=selective: not supported with zero3, whose gathers are among the selected operations."
            " Use train.checkpointing=full or parallel.strategy=fsdp"
        )
    if config.train.compile:
        raise UserError(
            f"train.compile=true: not supported with {name}, because of DeepSpeed's hooks. Use train.compile=false or"
            " parallel.strategy=fsdp"
        )


def build_strategy(model: nn.Module, options: StrategyOptions) -> Strategy:
    """Build the strategy for ``model``, which is on the meta device. Its parameters get memory, but no values yet."""
    name = strategy_name(options.config, options.ranks.world)
    if name.startswith("zero"):
        return ZeroStrategy(model, options, stage=int(name[-1]))
    if name in ("fsdp", "hsdp"):
        return FSDPStrategy(model, options)
    return TorchStrategy(model, options) if options.ranks.world == 1 else DDPStrategy(model, options)
