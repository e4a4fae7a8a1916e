"""Loading of pretrained models, optionally with another head, from a folder or from the Hugging Face hub."""

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
    """Return the trained model in ``source``, in evaluation mode.

    Example: ``from_pretrained("runs/vim2_digits", num_classes=5)`` for fine-tuning on five other classes.

    Args:
        source: A folder written by ``mmtrain export`` or :func:`save_pretrained`, a run folder, or the id of a model on
            the Hugging Face hub ("user/name"). An existing folder takes precedence over the hub.
        revision: Branch, tag or commit on the hub.
        checkpoint: Checkpoint of a run folder, as in :func:`load_trained`.
        overrides: Arguments of the model's configuration. Parameters of the head that are missing or then have another
            shape keep their initial values, with a warning; all others must fit.

    Raises:
        UserError: If the model does not exist, a file is missing or damaged, the hub cannot be reached, an argument is
            unknown, or weights do not fit the model (with the parameters and both shapes).
    """
    folder = Path(source)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise UserError(f"{source}: neither an existing folder nor the id of a model on the hub (user/name)")
        folder = _download(str(source), revision)
    elif revision is not None:
        raise UserError(f"revision={revision!r} applies to the hub, but {source} is a folder: leave it out")
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
    """Download the three files of a hub repository and return their folder in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise UserError(
            f"{name}: there is no such folder, and loading a model from the hub requires huggingface_hub. Run `pip"
            " install huggingface_hub`"
        ) from None
    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except RepositoryNotFoundError:
        cure = "Check the name (for a private model, log in with `hf auth login`), or give an existing folder"
        raise UserError(f"{name}: there is no such folder and no such model on the hub. {cure}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: this model on the hub has no revision '{revision}'. Choose another one") from None
    except (LocalEntryNotFoundError, ConnectionError):
        raise UserError(
            f"{name}{at}: there is no such folder, the hub cannot be reached (or HF_HUB_OFFLINE is set), and the model"
            f" is not in the cache. Connect, or download it on another machine (`hf download {name}`) and give the"
            " folder"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}{at}: the model could not be downloaded from the hub: {reason}") from None
