"""Export folders: writing, reading and validating them, and loading their weights into a model.

The folder contains three files: ``model.safetensors`` (the weights), ``config.yaml`` (the whole resolved configuration)
and ``assets.json`` (classes and image scaling, or columns and scaler). ``mmtrain export`` and :func:`save_pretrained`
write it. It can be uploaded unchanged as a model repository of the Hugging Face hub. Nothing is unpickled.

``assets.json`` is validated when a model is loaded. A prediction that needs a missing key raises an error naming it.
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
#: Prefixes of the parameters of a head: the classifier of ViM2, and the maps to the horizon of TSM2.
_HEADS = ("head.", "linear.", "spread.")
#: Largest number of parameters named in an error.
_SHOWN = 5
_AGAIN = "export or download it again"


def save_pretrained(model: nn.Module, config: RunConfig, assets: dict[str, Any], folder: str | Path) -> Path:
    """Write ``model`` to the new folder ``folder``, for :func:`from_pretrained` and ``mmtrain predict``.

    Args:
        model: The model.
        config: Configuration of the run. Its section ``model`` is replaced by the configuration of ``model``.
        assets: Data needed for prediction, as in the ``assets.json`` of a run.
        folder: The folder to create.

    Raises:
        UserError: If ``folder`` exists or cannot be written.
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
    """Return the configuration and the weights in ``folder``. Errors call it ``source``, the name given by the user.

    Raises:
        UserError: If a file is missing or damaged.
    """
    lacking = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if lacking:
        raise UserError(
            f"{source}: contains no mmtrain model (missing: {', '.join(lacking)}). Write one with `mmtrain export`"
        )
    try:
        with os_errors(f"{folder / WEIGHTS} cannot be read", _AGAIN):
            weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): {_AGAIN}") from None
    return load_config(folder / CONFIG), weights


def check_finite(model: nn.Module, source: str | Path) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        UserError: Names the first such parameter.
    """
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise UserError(
                f"{source}: {name} has values that are NaN or infinite: use another checkpoint, or {_AGAIN}"
            )


def fitted_model(
    config: ModelConfig, weights: dict[str, Tensor], source: str | Path, overrides: Collection[str] = ()
) -> nn.Module:
    """Return the model of ``config`` with ``weights``. A head that does not fit keeps its initial values.

    Args:
        config: Configuration of the model.
        weights: The weights.
        source: Name of the weights in errors.
        overrides: Keys of the model that the user has changed. If there are none, the head must fit too.

    Raises:
        UserError: If parameters do not fit. The message names them with both shapes.
    """
    with torch.device("meta"):  # wrong shapes must not take memory
        initial = _unfit(build_model(config), weights, source, overrides)
    model = build_model(config)
    fitting = {key: tensor for key, tensor in weights.items() if key not in initial}
    model.load_state_dict(fitting, strict=False)
    check_finite(model, source)
    kept = [key for key in initial if key in model.state_dict()]
    if kept:
        logger.warning(
            "%s: the head has another shape, so these parameters keep their initial values: %s", source, ", ".join(kept)
        )
    return model


def _unfit(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, overrides: Collection[str] = ()
) -> list[str]:
    """Return the names of parameters of the head that do not fit. Raise UserError if other parameters do not fit."""
    expected = model.state_dict()
    wrong = [key for key in sorted({*expected, *weights}) if key not in expected or key not in weights]
    common = [key for key in expected if key in weights]
    wrong += [key for key in common if expected[key].shape != weights[key].shape]
    kinds = [key for key in common if expected[key].is_floating_point() != weights[key].is_floating_point()]
    if kinds:
        found, wanted = weights[kinds[0]].dtype, expected[kinds[0]].dtype
        raise UserError(f"{source}: {kinds[0]} is {found} in the file, but {wanted} in the model: {_AGAIN}")
    faults = [key for key in wrong if not (overrides and key.startswith(_HEADS))]
    if faults:

        def shape(tensors: dict[str, Tensor], key: str) -> str:
            return str(tuple(tensors[key].shape)) if key in tensors else "none"

        shown = [f"{key} (file {shape(weights, key)}, model {shape(expected, key)})" for key in faults[:_SHOWN]]
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        cure = (
            f"Of {', '.join(overrides)}, leave out the arguments that change more than the head"
            if overrides
            else "The file and its configuration belong to different models: export the model again"
        )
        raise UserError(f"{source}: {len(faults)} parameters do not fit: {', '.join(shown)}{more}. {cure}")
    return wrong


_CURE = "restore it, or train or export again"
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: Image size, with a limit far above that of any model: a damaged value must not make an image huge.
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
    """The content of ``file``. Access to a missing key raises a UserError."""

    def __init__(self, found: dict[str, Any], file: Path) -> None:
        super().__init__(found)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file}: the key '{key}' is missing, which this command needs: {_CURE}")


def read_assets(file: Path, config: RunConfig) -> Assets:
    """Read and validate the facts about the training data that predictions with the model of ``config`` need.

    Raises:
        UserError: If the file is missing or damaged.
    """
    found = Assets(read_json(file, _CURE), file)
    kinds = {"shards": _Images, "ffcv": _Images, "synthetic": _Images, "series": _Table, "panel": _Panel}
    kind: Any = kinds.get(config.data.kind)
    if kind is None:  # a data source defined by the user
        return found
    try:
        TypeAdapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} is damaged ({where}: {first['msg']}): {_CURE}") from None
    return found


def check_fits(assets: dict[str, Any], model: ModelConfig, folder: Path) -> None:
    """Refuse assets of another model, with which class names or windows would be wrong.

    Raises:
        UserError: Names both values.
    """
    wanted: dict[str, Any] = {}
    if isinstance(model, ForecasterConfig):
        wanted = {"lookback": model.lookback, "horizon": model.horizon}
    for name, value in wanted.items():
        if assets[name] != value:
            raise UserError(
                f"{folder / ASSETS}: belongs to another model, because {name} is {assets[name]} there, but {value} in"
                " config.yaml. Restore the file"
            )
    if isinstance(model, ImageModelConfig) and len(assets["classes"]) != model.num_classes:
        count = len(assets["classes"])
        raise UserError(
            f"{folder / ASSETS}: belongs to another model, because it names {count} classes, but the model has"
            f" {model.num_classes}. Restore the file"
        )
