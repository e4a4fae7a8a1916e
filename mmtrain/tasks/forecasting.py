"""Multivariate forecasting: MSE and MAE on standardised values, every window counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ForecastingConfig, RunConfig, SeriesDataConfig, TSM2Config
from mmtrain.data.series import load_series
from mmtrain.errors import UserError
from mmtrain.models.tsm2 import Forecasts
from mmtrain.tasks.base import Batch, StepKey, Task


class Forecasting(Task):
    """The mean squared error on the validation split chooses the best checkpoint."""

    metric: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    plotted: ClassVar[tuple[str, ...]] = ("mse", "mae")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        model, data = config.model, config.data
        if not isinstance(model, TSM2Config):
            raise UserError(f"task.kind is 'forecasting', but model '{model.name}' makes no forecasts: use model=tsm2")
        if not isinstance(data, SeriesDataConfig):
            raise UserError(f"task.kind is 'forecasting', but data.kind is '{data.kind}': use data=series")
        self.options = cast(ForecastingConfig, config.task)
        self.lookback, self.horizon = model.lookback, model.horizon
        self.series = load_series(
            data.path,
            lookback=model.lookback,
            horizon=model.horizon,
            split=data.ratios if data.split == "ratio" else data.split,
            columns=data.columns,
            time_column=data.time_column,
            missing=data.missing,
            data_root=data.root or os.environ.get("MMTRAIN_DATA") or "data",
        )
        self.variates = len(self.series.table.columns)
        self.train, self.val, self.test = self.series.train, self.series.val, self.series.test

    def loss(self, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        distance = F.mse_loss if self.options.loss == "mse" else F.l1_loss
        made: Forecasts = model(batch["past"], full=True)
        loss = distance(made.point.float(), batch["future"])
        for spread in self._spread(made, batch["future"]).values():
            loss = loss + self.options.spread_weight * spread.mean()
        return loss

    def _spread(self, made: Forecasts, future: Tensor) -> dict[str, Tensor]:
        """The pinball loss or the negative log-likelihood of each number, (B, horizon, M), where the model has one."""
        if made.quantiles is not None:
            levels = torch.tensor(cast(TSM2Config, self.config.model).quantiles, device=future.device)
            short = future.unsqueeze(-1) - made.quantiles.float()
            return {"pinball": torch.maximum(levels * short, (levels - 1) * short).mean(-1)}
        if made.distribution is not None:
            return {"nll": -made.distribution.log_prob(future)}
        return {}

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        made: Forecasts = model(batch["past"], full=True)
        error = (made.point.float() - batch["future"]).double().flatten(1)
        spread = self._spread(made, batch["future"])
        return {
            "count": torch.tensor(len(error), dtype=torch.float64),
            "squared": error.square().mean(1).sum(),
            "absolute": error.abs().mean(1).sum(),
            **{name: values.double().flatten(1).mean(1).sum() for name, values in spread.items()},
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        count = sums["count"]
        mse = sums["squared"] / count
        spread: dict[str, float] = {name: sums[name] / count for name in ("pinball", "nll") if name in sums}
        return {"loss": mse, "mse": mse, "mae": sums["absolute"] / count, **spread, "samples": count}

    def assets(self) -> dict[str, Any]:
        return {
            "columns": list(self.series.table.columns),
            "scaler": self.series.scaler.to_dict(),
            "lookback": self.lookback,
            "horizon": self.horizon,
        }

    @torch.no_grad()
    def illustrate(self, model: nn.Module, folder: Path) -> list[Path]:
        """The last window of the test split: history, forecast and truth, in the units of the data."""
        from mmtrain.plots import draw_forecast

        source = self.series.test
        last = np.array([len(source) - 1])
        batch = source.fetch(last, None)
        device = next(model.parameters()).device
        forecast = model(batch["past"].to(device)).float().cpu()
        scaler, table = self.series.scaler, self.series.table
        past, future, made = (scaler.inverse(x[0].numpy()) for x in (batch["past"], batch["future"], forecast))
        first = int(source.rows(last)[0])
        stamps = None if table.stamps is None else table.stamps[first - len(past) : first + len(future)]
        path = folder / "forecast.png"
        draw_forecast(path, list(table.columns), past, made, truth=future, stamps=stamps)
        return [path]
