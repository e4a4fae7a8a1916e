"""Weights & Biases, when asked for. A failure is said once and the run goes on with its JSON lines."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from pathlib import Path
from typing import Any, cast

from mmtrain.config import RunConfig
from mmtrain.errors import UserError

logger = logging.getLogger("mmtrain")


class WandbRun:
    """One W&B run, continued under ``run_id`` when that is known."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "tracking.wandb is on, but wandb is not installed: pip install 'mmtrain[wandb]',"
                " or tracking.wandb=disabled"
            ) from None
        self.run_id = run_id or secrets.token_hex(4)
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=config.tracking.project,
                name=config.name,
                id=self.run_id,
                resume="allow",
                mode=cast(Any, config.tracking.wandb),
                dir=str(folder),
                config=dataclasses.asdict(config),
                settings=wandb.Settings(silent=True),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # any failure of a tracker must leave the training alone
            self._give_up(error)

    def log(self, line: dict[str, Any]) -> None:
        if self._run is None:
            return
        prefix = line.get("split", line["kind"])
        values = {f"{prefix}/{k}": v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        try:
            self._run.log({"step": line["step"], **values})
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logger.error(
            "W&B failed (%s: %s): this run goes on without it, its metrics.jsonl is complete."
            " Try tracking.wandb=offline, or set WANDB_API_KEY",
            type(error).__name__,
            error,
        )
