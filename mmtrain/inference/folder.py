"""The folder of a pretrained model, and how its weights are fitted to a model.

It holds three files: ``model.safetensors`` (the weights), ``config.yaml`` (the whole resolved configuration) and
``assets.json`` (classes and image scaling, or columns and scaler). ``mmtrain export`` and :func:`save_pretrained` write
it. Uploaded as it is, it is a model repository of the Hugging Face hub. Nothing is ever unpickled.

What ``assets.json`` may hold is checked once, when a model is loaded, and told by name where a prediction lacks it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from mmtrain.config import ForecasterConfig, ImageModelConfig, ModelConfig, RunConfig, load_config, replace, to_yaml
from mmtrain.errors import UserError, os_errors
from mmtrain.files import new_path, read_json
from mmtrain.log import logger
from mmtrain.models import build_model
from mmtrain.train.guards import is_finite

WEIGHTS, CONFIG, ASSETS = FILES = ("model.safetensors", "config.yaml", "assets.json")
#: Where the parameters of a head are: the classifier of ViM2; the maps to the horizon of TSM2.
_HEADS = ("head.", "linear.", "spread.")
_SHOWN = 5
_AGAIN = "export or download it again"


def save_pretrained(model: nn.Module, config: RunConfig, assets: dict[str, Any], folder: str | Path) -> Path:
    """Write ``model`` for :func:`from_pretrained` and ``mmtrain predict`` to the new ``folder``.

    Args:
        config: of the run; its ``model`` section is replaced by that of ``model``.
        assets: what prediction needs, as in the ``assets.json`` of a run.

    Raises:
        UserError: when ``folder`` exists or cannot be written.
    """
    folder = Path(folder)
    config = replace(config, model=cast(ModelConfig, model.config))
    with new_path(folder) as partial:
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(to_yaml(config))
        (partial / ASSETS).write_text(json.dumps(assets, indent=1))
    return folder


def read_pretrained(folder: Path, source: str | Path) -> tuple[RunConfig, dict[str, Tensor]]:
    """The configuration and the weights in ``folder``, which the user calls ``source``.

    Raises:
        UserError: for a file that is missing or broken.
    """
    lacking = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if lacking:
        raise UserError(
            f"{source} holds no model of mmtrain: it lacks {' and '.join(lacking)} (write one with `mmtrain export`)"
        )
    try:
        with os_errors(f"{folder / WEIGHTS} cannot be read", _AGAIN):
            weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): {_AGAIN}") from None
    return load_config(folder / CONFIG), weights


def check_finite(model: nn.Module, source: str | Path) -> None:
    """Refuse weights that are not finite numbers.

    Raises:
        UserError: with the first of them.
    """
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise UserError(
                f"{source}: {name} has values that are NaN or infinite: use another checkpoint, or {_AGAIN}"
            )


def fitted_model(
    config: ModelConfig, weights: dict[str, Tensor], source: str | Path, overrides: Collection[str] = ()
) -> nn.Module:
    """The model of ``config`` with ``weights``. Parameters of another head keep their initialisation, and are logged.

    Args:
        overrides: arguments of the model that the user has changed; without any, the head must fit too.

    Raises:
        UserError: for parameters that do not fit, with both shapes.
    """
    with torch.device("meta"):  # so that wrong shapes take no memory
        fresh = _unfit(build_model(config), weights, source, overrides)
    model = build_model(config)
    there = {key: tensor for key, tensor in weights.items() if key not in fresh}
    model.load_state_dict(there, strict=False)
    check_finite(model, source)
    kept = [key for key in fresh if key in model.state_dict()]
    if kept:
        logger.warning("%s: these start fresh, since the head is another one: %s", source, ", ".join(kept))
    return model


def _unfit(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, overrides: Collection[str] = ()
) -> list[str]:
    """The parameters of the head, in ``model`` or in ``weights``, that do not fit; UserError for any others."""
    own = model.state_dict()
    wrong = [key for key in sorted({*own, *weights}) if key not in own or key not in weights]
    wrong += [key for key in own if key in weights and own[key].shape != weights[key].shape]
    kinds = [key for key in own if key in weights and own[key].is_floating_point() != weights[key].is_floating_point()]
    if kinds:
        there, wanted = weights[kinds[0]].dtype, own[kinds[0]].dtype
        raise UserError(f"{source}: {kinds[0]} is {there} in the file and {wanted} in the model: {_AGAIN}")
    faults = [key for key in wrong if not (overrides and key.startswith(_HEADS))]
    if faults:

        def shape(tensors: dict[str, Tensor], key: str) -> str:
            return str(tuple(tensors[key].shape)) if key in tensors else "none"

        shown = [f"{key} (file {shape(weights, key)}, model {shape(own, key)})" for key in faults[:_SHOWN]]
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        cure = (
            f"leave out {', '.join(overrides)} as far as they change more than the head"
            if overrides
            else "the file and its configuration are not of one model: export it again"
        )
        raise UserError(f"{source}: {len(faults)} parameters do not fit: {', '.join(shown)}{more}. Cure: {cure}")
    return wrong


_CURE = "restore it, or train or export again"
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: Far beyond any model of images; an image is resized to it before the model sees it.
_Pixels = Annotated[int, Field(ge=1, le=2**14)]


class _Images(TypedDict, total=False):
    classes: list[str]
    image_size: _Pixels
    mean: list[_Number]
    std: list[_Positive]
    crop_pct: Annotated[float, Field(gt=0, le=1)]


class _Known(TypedDict):
    columns: list[str]
    calendar: Any
    scaler: NotRequired[dict[str, Any]]


class _Series(TypedDict, total=False):
    columns: Annotated[list[str], Field(min_length=1)]
    lookback: int
    horizon: int
    step: str | None


class _Table(_Series, total=False):
    scaler: dict[str, Any]  # Scaler checks it
    known: _Known


class _Panel(_Series, total=False):
    ids: list[str]
    mean: dict[str, Any]
    std: dict[str, Any]
    known: _Known
    static: list[dict[str, Any]]


class Assets(dict[str, Any]):
    """The assets in ``file``. A key that is not there is a UserError."""

    def __init__(self, found: dict[str, Any], file: Path) -> None:
        super().__init__(found)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file} has no '{key}', which is needed here: {_CURE}")


def read_assets(file: Path, config: RunConfig) -> Assets:
    """What a prediction with the model of ``config`` needs to know of the training data.

    Raises:
        UserError: for a file that is missing or damaged.
    """
    found = Assets(read_json(file, _CURE), file)
    kinds = {"shards": _Images, "ffcv": _Images, "synthetic": _Images, "series": _Table, "panel": _Panel}
    kind: Any = kinds.get(config.data.kind)
    if kind is None:  # of a source of the user's own
        return found
    try:
        TypeAdapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} is damaged ({where}: {first['msg']}): {_CURE}") from None
    return found


def check_fits(assets: dict[str, Any], model: ModelConfig, folder: Path) -> None:
    """Refuse a prediction with assets of another model: names of classes, or windows, would be wrong.

    Raises:
        UserError: with both numbers.
    """
    wanted: dict[str, Any] = {}
    if isinstance(model, ForecasterConfig):
        wanted = {"lookback": model.lookback, "horizon": model.horizon}
    for name, value in wanted.items():
        if assets[name] != value:
            raise UserError(f"{folder / ASSETS} is of another model: {name} is {assets[name]} there and {value} here")
    if isinstance(model, ImageModelConfig) and len(assets["classes"]) != model.num_classes:
        count = len(assets["classes"])
        raise UserError(f"{folder / ASSETS} is of another model: it names {count} classes of {model.num_classes}")
