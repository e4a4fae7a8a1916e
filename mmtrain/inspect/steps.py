"""The steps Δ with which a model selects, recorded while it runs (paper: "dual selection", of tokens and of channels).

A step of S6 says how much of a position enters the state: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t. With Δ near 0 the
state passes by the position unchanged; with a large Δ it forgets what was before and takes the position in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmtrain.inspect.kinds import mixer_labels
from mmtrain.models.mixers import ImageTokenMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer, VariateMixer
from mmtrain.ops.mix import Direction, convolved, observed

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
