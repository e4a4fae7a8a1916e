"""Models with trained weights: from a folder or the Hugging Face hub, with another head if asked for.

A pretrained model is a folder of three files: ``model.safetensors`` (the weights), ``config.yaml`` (the whole resolved
configuration) and ``assets.json`` (classes and image scaling, or columns and scaler). ``mmtrain export`` and
:func:`save_pretrained` write it; uploaded as it is, it is a model repository of the hub. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mmtrain.config import ModelConfig, RunConfig, from_yaml
from mmtrain.errors import UserError, nearest
from mmtrain.models.registry import build_model

logger = logging.getLogger("mmtrain")

WEIGHTS, CONFIG, ASSETS = FILES = ("model.safetensors", "config.yaml", "assets.json")
#: Where the parameters of a head are: the classifier of ViM2; the maps to the horizon of TSM2.
_HEADS = ("head.", "linear.", "spread.")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN = 5


def from_pretrained(
    source: str | Path, *, revision: str | None = None, checkpoint: str = "best", **overrides: Any
) -> nn.Module:
    """The trained model in ``source``, in evaluation mode.

    Example: ``from_pretrained("runs/vim2_digits", num_classes=5)`` for fine-tuning on five other classes.

    Args:
        source: a folder written by ``mmtrain export`` or :func:`save_pretrained`, a run folder, or the id of a model on
            the Hugging Face hub ("user/name"); a folder of that name goes first.
        revision: branch, tag or commit, for the hub.
        checkpoint: ``best``, ``last`` or a step, for a run folder.
        overrides: arguments of the model's configuration. Parameters of the head that then have another shape, or that
            the file lacks, start fresh, which is logged; all others must fit.

    Raises:
        UserError: no such model, a file that is missing or broken, no connection, an unknown argument; weights that do
            not fit the model, with the parameters and both shapes.
    """
    config, weights = _load(source, revision, checkpoint)
    model = build_model(_overridden(config, overrides, source))
    fresh = _fit(model, weights, source, overrides)
    if fresh:
        logger.warning("%s: these start fresh, since the head is another one: %s", source, ", ".join(fresh))
    return model.eval()


def save_pretrained(model: nn.Module, config: RunConfig, assets: dict[str, Any], folder: str | Path) -> Path:
    """Write ``model`` for :func:`from_pretrained` and ``mmtrain predict`` to the new ``folder``.

    Args:
        config: of the run; its ``model`` section is replaced by that of ``model``.
        assets: what prediction needs, as in the ``assets.json`` of a run.

    Raises:
        UserError: when ``folder`` exists or cannot be written.
    """
    from safetensors.torch import save_file

    from mmtrain.config import to_yaml

    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder (--out)")
    config = replace(config, model=cast(ModelConfig, model.config))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(to_yaml(config))
        (partial / ASSETS).write_text(json.dumps(assets, indent=1))
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _load(source: str | Path, revision: str | None, checkpoint: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    folder = Path(source)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise UserError(f"{source}: there is no such folder, and it is no id of a model on the hub (user/name)")
        folder = _download(str(source), revision)
    elif revision is not None:
        raise UserError(f"revision={revision!r} is for the hub, and {source} is a folder: leave it out")
    if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        from mmtrain.inference.trained import load_trained

        trained = load_trained(folder, checkpoint)
        return trained.config.model, trained.model.state_dict()
    return _read(folder, source)


def _read(folder: Path, source: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lacking = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if lacking:
        raise UserError(
            f"{source} holds no model of mmtrain: it lacks {' and '.join(lacking)} (write one with `mmtrain export`)"
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): export or download it again") from None
    return from_yaml(folder / CONFIG).model, weights


def _download(name: str, revision: str | None) -> Path:
    """The three files of a hub repository, in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise UserError(
            f"{name} is no folder here, and for a model on the hub huggingface_hub is needed: "
            "run `pip install huggingface_hub`"
        ) from None
    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except RepositoryNotFoundError:
        cure = "check the name (for a private one, log in with `hf auth login`), or give a folder that exists"
        raise UserError(f"{name}: there is no such folder here and no such model on the hub: {cure}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the hub has the model, but no revision '{revision}'") from None
    except (LocalEntryNotFoundError, ConnectionError):
        raise UserError(
            f"{name}{at}: there is no such folder here, the hub cannot be reached (or HF_HUB_OFFLINE is set), and the "
            f"model is not in the cache: connect, or download it elsewhere (`hf download {name}`) and give the folder"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}{at}: the hub gave no model: {str(error).strip().splitlines()[0]}") from None


def _overridden(config: ModelConfig, overrides: dict[str, Any], source: str | Path) -> ModelConfig:
    known = [f.name for f in fields(config) if f.name != "name"]
    for key in overrides:
        if key not in known:
            raise UserError(f"{source}: model '{config.name}' has no argument '{key}'{nearest(key, known)}")
    return replace(config, **overrides)


def _fit(model: nn.Module, weights: dict[str, Tensor], source: str | Path, overrides: dict[str, Any]) -> list[str]:
    """Load ``weights``; returns the parameters of the head that keep their initialisation."""
    own = model.state_dict()
    wrong = [key for key in sorted({*own, *weights}) if key not in own or key not in weights]
    wrong += [key for key in own if key in weights and own[key].shape != weights[key].shape]
    faults = [key for key in wrong if not (overrides and key.startswith(_HEADS))]
    if faults:
        shown = [f"{key} (file {_shape(weights, key)}, model {_shape(own, key)})" for key in faults[:_SHOWN]]
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        cure = (
            f"leave out {', '.join(overrides)} as far as they change more than the head"
            if overrides
            else "the file and its configuration are not of one model: export it again"
        )
        raise UserError(f"{source}: {len(faults)} parameters do not fit: {', '.join(shown)}{more}. Cure: {cure}")
    model.load_state_dict({key: tensor for key, tensor in weights.items() if key not in wrong}, strict=False)
    return [key for key in wrong if key in own]


def _shape(tensors: dict[str, Tensor], key: str) -> str:
    return str(tuple(tensors[key].shape)) if key in tensors else "none"
