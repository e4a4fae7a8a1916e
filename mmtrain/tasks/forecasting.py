"""Forecasting of tables and panels: MSE and MAE of standardised values over all windows, without missing values."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import TASKS, ForecasterConfig, ForecastingConfig, RunConfig, SeriesDataConfig
from mmtrain.data.core.fingerprint import Fingerprint, fingerprint_of
from mmtrain.data.open import check_inputs, open_data
from mmtrain.errors import UserError
from mmtrain.models.tsm2 import Forecasts
from mmtrain.plotting.runs import draw_forecast
from mmtrain.tasks import Batch, StepKey, Task


@TASKS.implements(ForecastingConfig)
class Forecasting(Task):
    """Forecasting task. The mean squared error on the validation split selects the best checkpoint."""

    metric: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    plotted: ClassVar[tuple[str, ...]] = ("mse", "mae")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        model, data = config.model, config.data
        if not isinstance(model, ForecasterConfig):
            raise UserError(f"task.kind=forecasting: model '{model.name}' makes no forecasts. Use model=tsm2")
        if not isinstance(data, SeriesDataConfig):
            raise UserError(
                f"task.kind=forecasting: data.kind={data.kind} has no time series. Use data=series or data=panel"
            )
        self.options = cast(ForecastingConfig, config.task)
        self.lookback, self.horizon = model.lookback, model.horizon
        self.series = open_data(data, model)
        check_inputs(self.series, model, data.path)
        self.variates = len(self.series.columns)
        self.train, self.val, self.test = self.series.train, self.series.val, self.series.test

    def loss(self, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        distance = F.mse_loss if self.options.loss == "mse" else F.l1_loss
        forecasts: Forecasts = model(batch["past"], **model_inputs(batch), full=True)
        observed = batch.get("future_mask")
        if observed is None:
            loss = distance(forecasts.point.float(), batch["future"])
        else:
            loss = _mean(distance(forecasts.point.float(), batch["future"], reduction="none"), observed)
        for spread in self._spread(forecasts, batch["future"]).values():
            loss = loss + self.options.spread_weight * (spread.mean() if observed is None else _mean(spread, observed))
        return loss

    def _spread(self, forecasts: Forecasts, future: Tensor) -> dict[str, Tensor]:
        """Return the pinball loss or negative log-likelihood of each target, shape (B, horizon, M).

        The result is empty for a model that makes only point forecasts.
        """
        if forecasts.quantiles is not None:
            levels = torch.tensor(cast(Any, self.config.model).quantiles, device=future.device)
            short = future.unsqueeze(-1) - forecasts.quantiles.float()
            return {"pinball": torch.maximum(levels * short, (levels - 1) * short).mean(-1)}
        if forecasts.distribution is not None:
            return {"nll": -forecasts.distribution.log_prob(future)}
        return {}

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums over windows of the mean error of each window.

        Unobserved targets count as 0. If the batch has a mask, ``observed`` is the sum of the fractions of observed
        targets.
        """
        forecasts: Forecasts = model(batch["past"], **model_inputs(batch), full=True)
        error = (forecasts.point.float() - batch["future"]).double().flatten(1)
        spread = self._spread(forecasts, batch["future"])
        observed = batch["future_mask"].flatten(1) if "future_mask" in batch else None

        def summed(values: Tensor) -> Tensor:
            return (values if observed is None else values.masked_fill(~observed, 0)).mean(1).sum()

        return {
            "count": torch.tensor(len(error), dtype=torch.float64),
            "squared": summed(error.square()),
            "absolute": summed(error.abs()),
            **{name: summed(values.double().flatten(1)) for name, values in spread.items()},
            **({} if observed is None else {"observed": observed.double().mean(1).sum()}),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Compute means over all observed targets of all windows.

        If values can be missing, ``observed`` is the fraction of observed targets.

        Raises:
            UserError: if the split contains no observed target.
        """
        count = sums["count"]
        observed = sums.get("observed", count)
        if not observed:
            raise UserError(
                f"{self.config.data.path}: a split has only missing target values and cannot be evaluated."  # type: ignore[attr-defined]
                " Check the values of the target columns, or change the borders of the splits"
            )
        mse = sums["squared"] / observed
        spread: dict[str, float] = {name: sums[name] / observed for name in ("pinball", "nll") if name in sums}
        fraction = {"observed": observed / count} if "observed" in sums else {}
        return {"loss": mse, "mse": mse, "mae": sums["absolute"] / observed, **spread, "samples": count, **fraction}

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return {**fingerprint_of(self.train), **self.series.fingerprint()}

    def assets(self) -> dict[str, Any]:
        return {
            "columns": self.series.columns,
            "lookback": self.lookback,
            "horizon": self.horizon,
            **self.series.assets(),
        }

    @torch.no_grad()
    def illustrate(self, model: nn.Module, folder: Path) -> list[Path]:
        """Plot the last window of the test split: input, forecast and true values, in the units of the data."""
        source = self.series.test
        index = len(source) - 1
        batch = source.fetch(np.array([index]), None)
        batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
        forecast = model(batch["past"], **model_inputs(batch)).float()
        origin = self.series.origin(source, index)
        values = (*_masked_as_nan(batch), forecast)
        past, future, predicted = (origin.scaler.inverse(x[0].cpu().numpy()) for x in values)
        path = folder / "forecast.png"
        draw_forecast(path, origin.labels, past, predicted, truth=future, stamps=origin.stamps)
        return [path]


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the model inputs of the batch in addition to the past: mask, static and known covariates, if present."""
    return {name: batch[name] for name in ("mask", "static", "known") if name in batch}


def _mean(values: Tensor, observed: Tensor) -> Tensor:
    """Return the mean over samples of each sample's mean over observed values. Both tensors have shape (B, H, M).

    A sample without observed values counts as 0. A mean over all observed values would weight samples by the other
    samples of their micro-batch.
    """
    count = observed.flatten(1).sum(1).clamp(min=1)
    return (values.masked_fill(~observed, 0).flatten(1).sum(1) / count).mean()


def _masked_as_nan(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return past and future with NaN for values that were not observed."""
    nothing = float("nan")
    pairs = (("past", "mask"), ("future", "future_mask"))
    past, future = (batch[x].masked_fill(~batch[m], nothing) if m in batch else batch[x] for x, m in pairs)
    return past, future
