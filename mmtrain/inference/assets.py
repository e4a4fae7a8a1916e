"""What ``assets.json`` may hold: checked once, when a model is loaded, and told by name where a prediction lacks it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mmtrain.config import ForecasterConfig, ImageModelConfig, ModelConfig, RunConfig
from mmtrain.errors import UserError
from mmtrain.files import read_json
from mmtrain.inference.folder import ASSETS

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
