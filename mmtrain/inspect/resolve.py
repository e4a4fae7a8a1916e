"""From what a user calls a model to its configuration: a model name, a configuration, or a run or export folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain.config import MODELS, ModelConfig, RunConfig, config_names, load_config
from mmtrain.config.models import preset
from mmtrain.errors import UserError, nearest


@dataclass(frozen=True)
class Subject:
    """What is looked at. ``run`` is None for a bare model name, ``folder`` for anything but a run or export folder."""

    model: ModelConfig
    run: RunConfig | None = None
    folder: Path | None = None


def resolve(name: str, overrides: Sequence[str] = ()) -> Subject:
    """Find the model called ``name``.

    Args:
        name: a name of the registry, a configuration's name or YAML file, or a run or export folder.
        overrides: ``key=value``. Keys of the model may stand without their ``model.``; a folder, whose model is made,
            takes keys of its data only.

    Raises:
        UserError: for an unknown name, key or value, with the nearest one.
    """
    if name in MODELS:
        return Subject(_overridden(name, overrides))
    folder = Path(name)
    if (folder / "config.yaml").is_file():
        fixed = [item for item in overrides if not item.startswith("data")]
        if fixed:
            raise UserError(f"{name} holds a trained model: it takes overrides of data only, not {', '.join(fixed)}")
        run = load_config(folder / "config.yaml", overrides)
        return Subject(run.model, run, folder)
    if folder.is_dir() and name not in config_names():
        raise UserError(f"{name} is no run or export folder: it has no config.yaml (list runs with `mmtrain runs`)")
    if folder.suffix not in (".yaml", ".yml") and name not in config_names():
        configurations = ", ".join(config_names()) or "(no configs/ folder here)"
        raise UserError(
            f"'{name}' is no model, configuration or run folder{nearest(name, [*MODELS, *config_names()])}\n"
            f"  models: {', '.join(MODELS)}\n  configurations: {configurations}"
        )
    known = _keys(load_config(name).model)
    run = load_config(name, [f"model.{item}" if item.split("=")[0] in known else item for item in overrides])
    return Subject(run.model, run)


def _keys(model: ModelConfig) -> list[str]:
    """The model's own keys: not ``name``, which a run configuration has too."""
    return [field.name for field in fields(model) if field.name != "name"]


def _overridden(name: str, overrides: Sequence[str]) -> ModelConfig:
    """The named model with ``overrides``, typed and checked as in a configuration."""
    known = _keys(preset(name))
    items = [item.removeprefix("model.") for item in overrides]
    for item in items:
        key, equals, _ = item.partition("=")
        if not equals:
            raise UserError(f"'{item}' is not an override: write key=value, such as {known[0]}=10")
        if key.split("[")[0] not in known:
            raise UserError(f"model '{name}' has no key '{key}'{nearest(key, known)} (keys: {', '.join(known)})")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(preset(name)), OmegaConf.from_dotlist(items))
        return cast(ModelConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        cause: BaseException | None = error
        while cause is not None:  # a check of the model's own is the better message
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__
        raise UserError(f"model '{name}': {error.full_key}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # YAML's errors, which share no base class with OmegaConf's
        raise UserError(f"model '{name}': {' '.join(items)}: {error}") from None
