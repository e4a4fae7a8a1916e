"""Models with trained weights, with another head if asked for: from a folder or from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from mmtrain.config import replace
from mmtrain.errors import UserError, nearest
from mmtrain.inference.folder import CONFIG, FILES, fitted_model, read_pretrained
from mmtrain.inference.trained import SELECTED, load_trained

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def from_pretrained(
    source: str | Path, *, revision: str | None = None, checkpoint: str = SELECTED, **overrides: Any
) -> nn.Module:
    """The trained model in ``source``, in evaluation mode.

    Example: ``from_pretrained("runs/vim2_digits", num_classes=5)`` for fine-tuning on five other classes.

    Args:
        source: a folder written by ``mmtrain export`` or :func:`save_pretrained`, a run folder, or the id of a model on
            the Hugging Face hub ("user/name"); a folder of that name goes first.
        revision: branch, tag or commit, for the hub.
        checkpoint: for a run folder, as :func:`load_trained` takes it.
        overrides: arguments of the model's configuration. Parameters of the head that then have another shape, or that
            the file lacks, start fresh, which is logged; all others must fit.

    Raises:
        UserError: no such model, a file that is missing or broken, no connection, an unknown argument; weights that do
            not fit the model, with the parameters and both shapes.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise UserError(f"{source}: there is no such folder, and it is no id of a model on the hub (user/name)")
        folder = _download(str(source), revision)
    elif revision is not None:
        raise UserError(f"revision={revision!r} is for the hub, and {source} is a folder: leave it out")
    if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        trained = load_trained(folder, checkpoint)
        config, weights = trained.config.model, trained.model.state_dict()
    else:
        run, weights = read_pretrained(folder, source)
        config = run.model
    known = [key for key in type(config).model_fields if key != "name"]
    for key in overrides:
        if key not in known:
            raise UserError(f"{source}: model '{config.name}' has no argument '{key}'{nearest(key, known)}")
    return fitted_model(replace(config, **overrides), weights, source, overrides).eval()


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
