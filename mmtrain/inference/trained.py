"""Loading of trained models from run folders and exports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain.config import RunConfig
from mmtrain.data.series.timeline import Step
from mmtrain.errors import UserError
from mmtrain.inference.folder import (
    ASSETS,
    WEIGHTS,
    check_finite,
    fitted_model,
    read_assets,
    read_pretrained,
    save_pretrained,
)
from mmtrain.log import logger
from mmtrain.models import build_model
from mmtrain.parallel.ranks import Ranks
from mmtrain.runs.folder import RunFolder, checkpoints_in
from mmtrain.train.checkpoint.store import CheckpointStore, verify
from mmtrain.train.checkpoint.tensor_files import check_weights, read_weights
from mmtrain.train.state import TrainState


@dataclass
class TrainedModel:
    """A trained model and the data needed to use it.

    Attributes:
        model: The model in evaluation mode, on the CPU.
        config: Configuration of the run.
        assets: Facts about the training data, such as class names or scalers.
        folder: The run folder or export.
        step: Step of the checkpoint, or None for an export.
    """

    model: nn.Module
    config: RunConfig
    assets: dict[str, Any]
    folder: Path
    step: int | None

    def check_step(self, source: Path, step: Step | None) -> None:
        """Log a warning if ``step``, the time step of ``source``, differs from that of the training data."""
        trained_on = self.assets.get("step")  # runs of version 0.1.0 have none
        if step is not None and trained_on is not None and str(step) != trained_on:
            logger.warning(
                "%s: its time step is %s, but the model was trained on time steps of %s. The forecast has %d time steps"
                " of %s",
                source,
                step,
                trained_on,
                self.assets.get("horizon", 0),
                step,
            )


#: Name of the default checkpoint.
SELECTED = "selected"


def load_trained(folder: str | Path, checkpoint: str = SELECTED) -> TrainedModel:
    """Load a trained model from a run folder, or from a folder written by :func:`export`.

    Averaged weights are loaded if the run has them.

    Args:
        folder: The folder.
        checkpoint: Checkpoint of a run folder: "best", "last", a step, or "selected". The selected checkpoint is the
            one that the run tested at its end, or before its end the one that ``eval.select`` names.

    Raises:
        UserError: If ``folder`` contains no model, or the checkpoint does not exist or is damaged.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        config, weights = read_pretrained(folder, folder)
        model = fitted_model(config.model, weights, folder)
        return TrainedModel(model.eval(), config, read_assets(folder / ASSETS, config), folder, None)
    if any(folder.glob("model.*")) and not (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} contains an export for use without mmtrain. Load it with onnxruntime or torch.export.load, or"
            " export the run again with --format safetensors"
        )
    run = RunFolder.existing(folder)
    config = run.config()
    path = _checkpoint(run, checkpoint, config.eval.select)
    averaged = config.train.ema_decay is not None
    with torch.device("meta"):  # wrong shapes must not take memory
        check_weights(build_model(config.model), path, averaged=averaged)
    model = build_model(config.model)
    read_weights(model, path, averaged=averaged)
    check_finite(model, path)
    return TrainedModel(model.eval(), config, read_assets(run.assets_file, config), folder, TrainState.read(path).step)


def _checkpoint(run: RunFolder, which: str, select: str) -> Path:
    if which not in (SELECTED, "best", "last") and not re.fullmatch("[0-9]{1,18}", which):
        raise UserError(f"--checkpoint {which}: choose {SELECTED}, best, last or a step")
    store = CheckpointStore(run.checkpoints, Ranks(0, 1, torch.device("cpu")), clean=False)
    newest = store.newest()
    if newest is None:
        raise UserError(f"{run.path}: there is no checkpoint yet. Train first, or wait for the first evaluation")
    step = None
    if which == SELECTED:
        result = run.result()
        step = result.get("tested_step") if result is not None else None
        which = select if step is None else which
    if which == "best":
        step = TrainState.read(newest).best_step
    elif which.isdigit():
        step = int(which)
    path = store.at(step) if isinstance(step, int) else newest
    fault = verify(path)
    if fault:
        available = ", ".join(found.name for found in checkpoints_in(run.checkpoints).values())
        raise UserError(
            f"{path} cannot be used: {fault}. Choose another one with --checkpoint (available: {available})"
        )
    return path


def export(trained: TrainedModel, out: str | Path) -> Path:
    """Write ``model.safetensors``, ``config.yaml`` and ``assets.json`` to the new folder ``out`` and return it.

    Raises:
        UserError: If ``out`` exists or cannot be written.
    """
    return save_pretrained(trained.model, trained.config, trained.assets, out)
