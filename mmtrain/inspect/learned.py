"""Learned weights of the weighted averaging, and learned selection of the mixers.

:func:`averaging_matrices` reads α, β, θ, γ of the weighted averaging (paper, "Weighted Averaging of Earlier Features").
The paper's "dual selection", of tokens and of channels, is visible in the step sizes Δ of the mixers.

The step size Δ of S6 determines how much of a position enters the state: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t. With Δ
near 0 the state ignores the position; with a large Δ it forgets earlier positions and stores this one.
:func:`step_maps` records the step sizes during any forward pass, :func:`window_selection` and :func:`image_selection`
for a trained model and one window or image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmtrain.config import RunConfig, TSM2Config
from mmtrain.errors import UserError
from mmtrain.inference import TrainedModel, classify, forecast
from mmtrain.models.averaging import MixerStack
from mmtrain.models.mixers import ImageTokenMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer, VariateMixer
from mmtrain.ops.mix import Direction, convolved, observed
from mmtrain.plotting.selection import AveragingMatrix, ImageSelection, StepMap, WindowSelection
from mmtrain.tasks import build_task

#: Mixers with a map. Channel mixers of images scan windows of channels, and an MLP has no step size.
_KINDS: dict[type[nn.Module], str] = {TimeMixer: "time", VariateMixer: "variate", ImageTokenMixer: "image"}


@torch.no_grad()
def mean_steps(ssm: S6, x: Tensor) -> Tensor:
    """Return Δ = softplus(Linear_Δ(x)), averaged over the features.

    Args:
        ssm: The S6 module.
        x: Its input, (B, L, features).

    Returns:
        Mean step sizes, float32 (B, L).
    """
    low_rank = F.linear(x, ssm.x_proj.weight[: ssm.rank])
    return F.softplus(ssm.dt_proj(low_rank).float()).mean(-1)


@torch.no_grad()
def step_maps(model: nn.Module, forward: Callable[[], object]) -> list[StepMap]:
    """Return the mean step sizes of all time, variate and image token mixers during one forward pass.

    Args:
        model: The model.
        forward: A function that runs ``model`` once.
    """
    mixers = {name: module for name, module in model.named_modules() if type(module) in _KINDS}
    scans = {name: [m for m in mixer.modules() if isinstance(m, S6)] for name, mixer in mixers.items()}
    shapes: dict[nn.Module, torch.Size] = {}
    steps: dict[nn.Module, Tensor] = {}
    owners: dict[int, tuple[Tensor, S6]] = {}

    def keep_shape(mixer: nn.Module, args: tuple[Any, ...]) -> None:
        shapes[mixer] = args[0].shape

    def keep_owner(ssm: nn.Module, args: tuple[Any, ...], direction: Direction) -> None:
        assert isinstance(ssm, S6)
        owners[id(direction.A)] = direction.A, ssm  # keep A alive, so that no other tensor gets its id

    def keep_steps(x: Tensor, directions: Sequence[Direction], height: int) -> None:
        for direction in directions:
            if id(direction.A) in owners:
                _, ssm = owners[id(direction.A)]
                steps[ssm] = mean_steps(ssm, convolved(x.flatten(0, -3), direction)).cpu()

    hooks = [mixer.register_forward_pre_hook(keep_shape) for mixer in mixers.values()]
    hooks += [ssm.register_forward_hook(keep_owner) for each in scans.values() for ssm in each]
    try:
        with observed(keep_steps):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for name, mixer in mixers.items():
        if mixer not in shapes:  # the model did not run it
            continue
        batch, *grid = shapes[mixer][:3]
        if not isinstance(mixer, ImageTokenMixer):
            grid = [-1, steps[scans[name][0]].shape[-1]]  # sequences in the layout of the mixer
        # step sizes are stored by position, whatever the order of the scan
        found = torch.stack([steps[ssm].view(batch, *grid)[0] for ssm in scans[name]]).mean(0).numpy()
        siblings, _, number = name.rpartition(".")
        label = mixer_labels(cast(nn.ModuleList, model.get_submodule(siblings)))[int(number)]
        maps.append(StepMap(name, label, _KINDS[type(mixer)], found))
    return maps


def window_selection(
    trained: TrainedModel, config: RunConfig | None = None, series: Path | None = None
) -> WindowSelection:
    """Return the step sizes of a forecaster on the last window of the test split, or of the file ``series``.

    Args:
        trained: The trained model.
        config: The run's configuration with another data section (default: ``trained.config``).
        series: A table whose last window is used instead.

    Raises:
        UserError: If the data is missing or does not fit the model, or the model is no forecaster.
    """
    _check_kind(trained, "forecasting", "--image")
    model = cast(TSM2Config, trained.config.model)
    # first time step of each patch of the lookback (the patches of auxiliary inputs follow them)
    starts = np.arange(0, model.lookback - model.patch_size + 1, model.patch_stride)
    if series is not None:
        forecasts: list[Any] = []
        missing = getattr(trained.config.data, "missing", "error")
        maps = step_maps(trained.model, lambda: forecasts.append(forecast(trained, series, missing=missing)))
        found = forecasts[0]
        time: NDArray[Any] = np.arange(-model.lookback, 0) if found.stamps is None else found.stamps[: model.lookback]
        return WindowSelection(maps, found.columns, found.past, time, starts)
    task: Any = build_task(config or trained.config)
    last = np.array([len(task.test) - 1])
    batch = task.test.fetch(last, None)
    extra = {key: batch[key] for key in ("mask", "static", "known") if key in batch}
    maps = step_maps(trained.model, lambda: trained.model(batch["past"], **extra))
    origin = task.series.origin(task.test, int(last[0]))
    time = (origin.rows if origin.stamps is None else origin.stamps)[: model.lookback]
    past = origin.scaler.inverse(batch["past"][0].numpy())
    return WindowSelection(maps, task.series.columns, past, time, starts)


@torch.no_grad()
def image_selection(
    trained: TrainedModel, config: RunConfig | None = None, image: Path | None = None
) -> ImageSelection:
    """Return the step sizes of a classifier on the first test image (else validation image), or on the file ``image``.

    Args:
        trained: The trained model.
        config: The run's configuration with another data section (default: ``trained.config``).
        image: An image file that is used instead.

    Raises:
        UserError: If the data is missing or does not fit the model, or the model does not take images.
    """
    _check_kind(trained, "classification", "--series")
    seen: list[torch.Tensor] = []
    hook = trained.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        if image is not None:
            maps = step_maps(trained.model, lambda: classify(trained, [image]))
            title = image.name
        else:
            task = build_task(config or trained.config)
            source, title = (
                (task.val, "first validation image") if task.test is None else (task.test, "first test image")
            )
            batch = source.fetch(np.array([0]), None)
            maps = step_maps(trained.model, lambda: trained.model(batch["image"]))
    finally:
        hook.remove()
    mean, std = (np.asarray(trained.assets[key], np.float32) for key in ("mean", "std"))
    pixels = seen[0][0].permute(1, 2, 0).numpy() * std + mean
    return ImageSelection(maps, pixels.clip(0, 1), title)


def _check_kind(trained: TrainedModel, kind: str, flag: str) -> None:
    if trained.config.task.kind != kind:
        raise UserError(f"{trained.folder} contains a model for {trained.config.task.kind}: use {flag} instead")


def mixer_labels(mixers: nn.ModuleList) -> list[str]:
    """Return labels T1, T2, C1, …, which number token and channel mixers separately in their order."""
    kinds = ["C" if getattr(mixer, "mixes", "") == "channels" else "T" for mixer in mixers]
    return [f"{kind}{kinds[: i + 1].count(kind)}" for i, kind in enumerate(kinds)]


def averaging_matrices(model: nn.Module) -> list[AveragingMatrix]:
    """Return the weights of every :class:`MixerStack` in ``model``, or [] if it has no weighted averaging."""
    found = []
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, MixerStack) and len(m.averages)]
    for number, (name, stack) in enumerate(stacks, 1):
        labels = mixer_labels(stack.mixers)
        size = len(stack.averages)
        weights = np.full((size, size), np.nan, np.float32)
        for i, average in enumerate(stack.averages):
            row = average.get_parameter("weight").detach().float().cpu().numpy().copy()
            row[0] += float(average.get_parameter("input_copy").detach())
            weights[i, : len(row)] = row
        title = f"stage {number}" if name.startswith("stages.") else name
        found.append(AveragingMatrix(title, [*labels, "out"], ["x", *labels], weights))
    return found
