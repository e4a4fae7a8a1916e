"""Where the lines and pictures of a run go: JSON lines always, W&B and TensorBoard when asked for."""

from __future__ import annotations

import importlib.util

from mmtrain.config import RunConfig
from mmtrain.errors import SharedError
from mmtrain.runs.folder import RunFolder
from mmtrain.train.trackers.base import JsonLines, MetricSink, TensorBoard, read_metrics
from mmtrain.train.trackers.wandb import WandbRun

__all__ = ["JsonLines", "MetricSink", "TensorBoard", "WandbRun", "check_installed", "open_sinks", "read_metrics"]


def check_installed(config: RunConfig) -> None:
    """See that the packages that ``config.tracking`` wants are there, before anything is made or loaded.

    Raises:
        SharedError: with the command that installs what is missing; on every rank alike.
    """
    wanted = {"wandb": config.tracking.wandb != "disabled", "tensorboard": config.tracking.tensorboard}
    for name, on in wanted.items():
        if on and importlib.util.find_spec(name) is None:
            off = f"tracking.{name}={'disabled' if name == 'wandb' else 'false'}"
            raise SharedError(
                f"tracking.{name} is on, but {name} is not installed: pip install 'mmtrain[{name}]', or {off}"
            )


def open_sinks(
    config: RunConfig, run: RunFolder, lines: JsonLines, step: int, known_id: str | None
) -> list[MetricSink]:
    """All that ``config.tracking`` asks for, ``lines`` first; rank 0 calls it.

    Args:
        step: the last step that counts: what was written of later ones is taken again.
        known_id: the W&B run id in the checkpoint that the run goes on from.
    """
    sinks: list[MetricSink] = [lines]
    if config.tracking.wandb != "disabled":
        sinks.append(WandbRun(config, run, known_id, restart=lines.restarts()))
    if config.tracking.tensorboard:
        sinks.append(TensorBoard(run.path / "tensorboard", step))
    return sinks
