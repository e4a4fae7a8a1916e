"""What the ranks of a gang are asked to do."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mmtrain.config import RunConfig
from mmtrain.parallel.strategy import to_local
from mmtrain.tasks import Batch, StepKey
from mmtrain.tasks.forecasting import Forecasting
from mmtrain.train.checkpoint.tensor_files import write_tensors
from mmtrain.train.loop import Trainer
from mmtrain.train.session import train
from mmtrain.train.state import Snapshots, TrainState

#: Where a resumed run leaves a copy of what it has loaded.
LOADED = "loaded"


def trained(config: RunConfig, folder: Path) -> None:
    """Train in ``folder``, without the pictures at the end, which other tests look at."""
    with patch.object(Trainer, "_illustrate", lambda *_: []):
        train(config, folder)


def resumed(config: RunConfig, folder: Path) -> None:
    """Go on in ``folder``, and write there what was loaded as this strategy would save it."""

    def copy(snapshots: Snapshots) -> None:
        shadow = snapshots.average.shadow if snapshots.average is not None else None
        write_tensors(folder / LOADED, snapshots.strategy.state_dict(shadow), snapshots.store._group)

    with _after_loading(copy):
        trained(config, folder)


def forgetful(config: RunConfig, folder: Path) -> None:
    """Go on in ``folder``, with AdamW's moments lost."""

    def forget(snapshots: Snapshots) -> None:
        for state in snapshots.strategy.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    with _after_loading(forget):
        trained(config, folder)


def sick(config: RunConfig, folder: Path) -> None:
    """Train a forecaster whose third step has a loss of NaN on the last rank alone."""
    sound, last = Forecasting.loss, os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def loss(task: Forecasting, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        value = sound(task, model, batch, key)
        return value * torch.nan if last and key.step == 2 else value

    with patch.object(Forecasting, "loss", loss):
        trained(config, folder)


@contextmanager
def _after_loading(action: Callable[[Snapshots], None]) -> Iterator[None]:
    begin = Snapshots.begin

    def wrapped(snapshots: Snapshots, *arguments: Any) -> TrainState:
        state = begin(snapshots, *arguments)
        action(snapshots)
        return state

    with patch.object(Snapshots, "begin", wrapped):
        yield


def dtypes(config: RunConfig, folder: Path) -> dict[str, dict[str, torch.dtype]]:
    """Train; returns the dtype of each parameter as a forward pass finds it, and of all that is kept between steps."""
    found: dict[str, dict[str, torch.dtype]] = {"forward": {}, "kept": {}}
    fit = Trainer.fit

    def watched(trainer: Trainer) -> Any:
        for name, module in trainer.strategy.model.named_modules():
            module.register_forward_pre_hook(_note(name, found["forward"]))
        outcome = fit(trainer)
        for name, p in trainer.strategy.local_parameters().items():
            found["kept"][name] = p.dtype
        for i, state in enumerate(trainer.strategy.optimizer.state.values()):
            found["kept"] |= {f"{key} {i}": to_local(value).dtype for key, value in state.items()}
        return outcome

    with patch.object(Trainer, "fit", watched):
        trained(config, folder)
    return found


def _note(name: str, found: dict[str, torch.dtype]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, _: Any) -> None:
        # a scan uses the parameters of the linear map in it, and does not call that
        for key, p in module.named_parameters(recurse=getattr(module, "keep_float32", False)):
            found[f"{name}.{key}"] = p.dtype

    return hook


def collectives(config: RunConfig, folder: Path) -> dict[str, int]:
    """Train; returns how often this rank ran each collective operation of gloo or of our own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trained(config, folder)
    return dict(Counter(e.name for e in profile.events() if e.name.startswith(("gloo:", "direct::"))))
