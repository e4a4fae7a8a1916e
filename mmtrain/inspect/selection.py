"""The steps Δ with which a model selects, recorded while it runs (paper: "dual selection", of tokens and of channels).

A step of S6 says how much of a position enters the state: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t. With Δ near 0 the
state passes by the position unchanged; with a large Δ it forgets what was before and takes the position in.

What a trained model selected: its steps Δ over one window of a series, or over one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmtrain.config import RunConfig, TSM2Config
from mmtrain.errors import UserError
from mmtrain.inference.trained import TrainedModel, classify, forecast
from mmtrain.models.kinds import mixer_labels
from mmtrain.models.mixers import ImageTokenMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer, VariateMixer
from mmtrain.ops.mix import Direction, convolved, observed
from mmtrain.tasks import build_task

_MAPPED = (TimeMixer, VariateMixer, ImageTokenMixer)


@dataclass(frozen=True)
class StepMap:
    """The steps of one mixer, the mean over its features and scan directions, for the first sample of a batch.

    ``steps`` float32, all positive: of a :class:`TimeMixer` (variates, patches), of a :class:`VariateMixer` (patches,
    variates), of an :class:`ImageTokenMixer` (height, width) of its grid of tokens. ``label``: T1, C1, … as in the
    matrices of the averaging.
    """

    name: str
    label: str
    mixer: nn.Module
    steps: NDArray[np.float32]

    @property
    def stack(self) -> str:
        """The name of the stack of mixers (a stage of ViM2, or TSM2's blocks)."""
        return self.name.partition(".mixers.")[0]


@torch.no_grad()
def mean_steps(ssm: S6, x: Tensor) -> Tensor:
    """Δ = softplus(Linear_Δ(x)), the mean over the features: x (B, L, features) → float32 (B, L)."""
    low_rank = F.linear(x, ssm.x_proj.weight[: ssm.rank])
    return F.softplus(ssm.dt_proj(low_rank).float()).mean(-1)


@torch.no_grad()
def step_maps(model: nn.Module, forward: Callable[[], object]) -> list[StepMap]:
    """Call ``forward``, which runs ``model`` once, and map the steps of its time, variate and image token mixers.

    Other mixers have no map: a channel mixer of images scans windows of channels, an MLP has no steps.
    """
    mixers = [(name, module) for name, module in model.named_modules() if isinstance(module, _MAPPED)]
    with _recorded([mixer for _, mixer in mixers]) as (shapes, steps):
        forward()
    return [
        StepMap(name, _label(model, name), mixer, _map(mixer, shapes[mixer], steps))
        for name, mixer in mixers
        if mixer in shapes
    ]


def _label(model: nn.Module, name: str) -> str:
    """The label of the mixer called ``name`` among those of its stack."""
    siblings, _, place = name.rpartition(".")
    return mixer_labels(cast(nn.ModuleList, model.get_submodule(siblings)))[int(place)]


@contextmanager
def _recorded(mixers: list[Any]) -> Iterator[tuple[dict[nn.Module, torch.Size], dict[nn.Module, Tensor]]]:
    """The shape of each mixer's input, and the mean steps of each S6 within, of the last forward pass."""
    shapes: dict[nn.Module, torch.Size] = {}
    steps: dict[nn.Module, Tensor] = {}
    owners: dict[int, tuple[Tensor, S6]] = {}

    def own(ssm: nn.Module, args: tuple[Any, ...], direction: Direction) -> None:
        assert isinstance(ssm, S6)
        owners[id(direction.A)] = direction.A, ssm  # held, so that its identity is nobody else's

    def keep_shape(mixer: nn.Module, args: tuple[Any, ...]) -> None:
        shapes[mixer] = args[0].shape

    def keep_steps(x: Tensor, directions: Sequence[Direction], height: int) -> None:
        for direction in directions:
            if id(direction.A) in owners:
                _, ssm = owners[id(direction.A)]
                with torch.no_grad():
                    u = convolved(x.flatten(0, -3), direction)
                steps[ssm] = mean_steps(ssm, u).cpu()

    hooks = [mixer.register_forward_pre_hook(keep_shape) for mixer in mixers]
    hooks += [ssm.register_forward_hook(own) for mixer in mixers for ssm in _scans(mixer)]
    try:
        with observed(keep_steps):
            yield shapes, steps
    finally:
        for hook in hooks:
            hook.remove()


def _scans(mixer: nn.Module) -> list[S6]:
    return [module for module in mixer.modules() if isinstance(module, S6)]


def _map(mixer: nn.Module, shape: torch.Size, steps: dict[nn.Module, Tensor]) -> NDArray[np.float32]:
    """The mean over the directions: the steps of all of them are by place, in whatever order they were taken."""
    found = [steps[ssm] for ssm in _scans(mixer)]
    if isinstance(mixer, ImageTokenMixer):
        _, h, w, _ = shape
        return torch.stack([step[0].view(h, w) for step in found]).mean(0).numpy()
    # of the first sample: (variates, patches) or (patches, variates), as the mixer lays its sequences out
    return torch.stack([step.view(shape[0], -1, step.shape[-1])[0] for step in found]).mean(0).numpy()


@dataclass(frozen=True)
class WindowSelection:
    """The step maps of one look-back window.

    ``past`` (lookback, M) in the units of the data; ``time`` (lookback,): times, or row numbers where there are none;
    ``starts`` (patches,): the place in the window at which each patch begins.
    """

    maps: list[StepMap]
    columns: list[str]
    past: NDArray[np.float32]
    time: NDArray[Any]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class ImageSelection:
    """The step maps of one image; ``image`` (H, W, 3) or (H, W, 1) in 0..1, as the model saw it."""

    maps: list[StepMap]
    image: NDArray[np.float32]
    what: str


def window_selection(
    trained: TrainedModel, config: RunConfig | None = None, series: Path | None = None
) -> WindowSelection:
    """The selection in the last window of the test split, or at the end of the file ``series``.

    Args:
        config: the run's configuration with other data, where it is not ``trained.config``.

    Raises:
        UserError: for data that is not there or does not fit, or a model that makes no forecasts.
    """
    _check_kind(trained, "forecasting", "--image")
    model = cast(TSM2Config, trained.config.model)
    if series is not None:
        made: list[Any] = []
        missing = getattr(trained.config.data, "missing", "error")
        maps = step_maps(trained.model, lambda: made.append(forecast(trained, series, missing=missing)))
        found = made[0]
        rows = np.arange(-model.lookback, 0)
        time = rows if found.stamps is None else found.stamps[: model.lookback]
        return WindowSelection(maps, found.columns, found.past, time, _starts(model))
    task: Any = build_task(config or trained.config)
    last = np.array([len(task.test) - 1])
    batch = task.test.fetch(last, None)
    extra = {key: batch[key] for key in ("mask", "static", "known") if key in batch}
    maps = step_maps(trained.model, lambda: trained.model(batch["past"], **extra))
    data, source = task.series, task.test
    stamps = data.stamps_of(source, int(last[0]))
    time = (data.rows_of(source, int(last[0])) if stamps is None else stamps)[: model.lookback]
    past = data.scaler_of(source, int(last[0])).inverse(batch["past"][0].numpy())
    return WindowSelection(maps, data.columns, past, time, _starts(model))


def _starts(model: TSM2Config) -> NDArray[np.int64]:
    """Where the patches that lie in the look-back begin (those of auxiliary inputs come behind them)."""
    return np.arange(0, model.lookback - model.patch_size + 1, model.patch_stride)


@torch.no_grad()
def image_selection(
    trained: TrainedModel, config: RunConfig | None = None, image: Path | None = None
) -> ImageSelection:
    """The selection in the image file ``image``, or in the first test (else validation) image of the run's data.

    Args:
        config: the run's configuration with other data, where it is not ``trained.config``.

    Raises:
        UserError: for data that is not there or does not fit, or a model that takes no images.
    """
    _check_kind(trained, "classification", "--series")
    seen: list[torch.Tensor] = []
    hook = trained.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        if image is not None:
            maps = step_maps(trained.model, lambda: classify(trained, [image]))
            what = image.name
        else:
            task = build_task(config or trained.config)
            source, what = (
                (task.val, "first validation image") if task.test is None else (task.test, "first test image")
            )
            batch = source.fetch(np.array([0]), None)
            maps = step_maps(trained.model, lambda: trained.model(batch["image"]))
    finally:
        hook.remove()
    mean, std = (np.asarray(trained.assets[key], np.float32) for key in ("mean", "std"))
    pixels = seen[0][0].permute(1, 2, 0).numpy() * std + mean
    return ImageSelection(maps, pixels.clip(0, 1), what)


def _check_kind(trained: TrainedModel, kind: str, flag: str) -> None:
    if trained.config.task.kind != kind:
        raise UserError(f"{trained.folder} holds a model for {trained.config.task.kind}: give {flag} instead")
