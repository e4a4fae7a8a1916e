"""A trained model with what it needs to be used, from a run folder or from an export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain.config import RunConfig
from mmtrain.data.series.timeline import Step
from mmtrain.errors import UserError
from mmtrain.inference.folder import ASSETS, WEIGHTS, fit_weights, read_pretrained, save_pretrained
from mmtrain.log import logger
from mmtrain.models import build_model
from mmtrain.parallel.ranks import Ranks
from mmtrain.runs.folder import RunFolder
from mmtrain.train.checkpoint.store import CheckpointStore, load_state, verify
from mmtrain.train.checkpoint.tensor_files import read_weights


@dataclass
class TrainedModel:
    """A model in evaluation mode with what it needs to be used. ``step`` is None for an export."""

    model: nn.Module
    config: RunConfig
    assets: dict[str, Any]
    folder: Path
    step: int | None

    def check_step(self, source: Path, step: Step | None) -> None:
        """Say so where the times of ``source`` have another step than those that the model was trained on."""
        trained_on = self.assets.get("step")  # runs of version 0.1.0 have none
        if step is not None and trained_on is not None and str(step) != trained_on:
            logger.warning(
                "%s: its step is %s, but the model was trained on a step of %s: the forecast is of %d steps of %s",
                source,
                step,
                trained_on,
                self.assets.get("horizon", 0),
                step,
            )


def load_trained(folder: str | Path, checkpoint: str = "best") -> TrainedModel:
    """Load from a run folder, or from a folder that :func:`export` wrote.

    Args:
        checkpoint: ``best``, ``last`` or a step, for a run folder. Averaged weights are used where they were kept.

    Raises:
        UserError: when there is no model in ``folder``, or no such checkpoint.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        config, weights = read_pretrained(folder, folder)
        model = build_model(config.model)
        fit_weights(model, weights, folder)
        return TrainedModel(model.eval(), config, json.loads((folder / ASSETS).read_text()), folder, None)
    if any(folder.glob("model.*")) and not (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} holds an export that runs without mmtrain: load it with onnxruntime or torch.export.load, or"
            " export the run again with --format safetensors"
        )
    run = RunFolder.existing(folder)
    config = run.config()
    model = build_model(config.model)
    path = _checkpoint(run, checkpoint)
    read_weights(model, path, averaged=config.train.ema_decay is not None)
    return TrainedModel(model.eval(), config, run.assets(), folder, load_state(path)["step"])


def _checkpoint(run: RunFolder, which: str) -> Path:
    alone = Ranks(0, 1, torch.device("cpu"))
    store = CheckpointStore(run.checkpoints, alone, clean=False)
    newest = store.newest()
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint yet: train it first, or wait for its first evaluation")
    if which == "last":
        return newest
    if which != "best" and not which.isdigit():
        raise UserError(f"--checkpoint {which}: give best, last or a step")
    step = load_state(newest)["best_step"] if which == "best" else int(which)
    path = store.at(step) if step is not None else newest
    fault = verify(path)
    if fault:
        there = ", ".join(sorted(p.name for p in run.checkpoints.glob("step_*")))
        raise UserError(f"{path} cannot be used: {fault} (there are: {there}); choose with --checkpoint")
    return path


def export(trained: TrainedModel, out: str | Path) -> Path:
    """Write ``model.safetensors``, ``config.yaml`` and ``assets.json`` to the new folder ``out``.

    Raises:
        UserError: when ``out`` exists or cannot be written.
    """
    return save_pretrained(trained.model, trained.config, trained.assets, out)
