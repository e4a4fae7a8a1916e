"""Forecasting of tables and panels: MSE and MAE on standardised values, every window counted, holes left out."""

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
    """The mean squared error on the validation split chooses the best checkpoint."""

    metric: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    plotted: ClassVar[tuple[str, ...]] = ("mse", "mae")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        model, data = config.model, config.data
        if not isinstance(model, ForecasterConfig):
            raise UserError(f"task.kind is 'forecasting', but model '{model.name}' makes no forecasts: use model=tsm2")
        if not isinstance(data, SeriesDataConfig):
            raise UserError(f"task.kind is 'forecasting', but data.kind is '{data.kind}': use data=series (or panel)")
        self.options = cast(ForecastingConfig, config.task)
        self.lookback, self.horizon = model.lookback, model.horizon
        self.series = open_data(data, model)
        check_inputs(self.series, model, data.path)
        self.variates = len(self.series.columns)
        self.train, self.val, self.test = self.series.train, self.series.val, self.series.test

    def loss(self, model: nn.Module, batch: Batch, key: StepKey) -> Tensor:
        distance = F.mse_loss if self.options.loss == "mse" else F.l1_loss
        made: Forecasts = model(batch["past"], **model_inputs(batch), full=True)
        seen = batch.get("future_mask")
        if seen is None:
            loss = distance(made.point.float(), batch["future"])
        else:
            loss = _mean(distance(made.point.float(), batch["future"], reduction="none"), seen)
        for spread in self._spread(made, batch["future"]).values():
            loss = loss + self.options.spread_weight * (spread.mean() if seen is None else _mean(spread, seen))
        return loss

    def _spread(self, made: Forecasts, future: Tensor) -> dict[str, Tensor]:
        """The pinball loss or the negative log-likelihood of each number, (B, horizon, M), where the model has one."""
        if made.quantiles is not None:
            levels = torch.tensor(cast(Any, self.config.model).quantiles, device=future.device)
            short = future.unsqueeze(-1) - made.quantiles.float()
            return {"pinball": torch.maximum(levels * short, (levels - 1) * short).mean(-1)}
        if made.distribution is not None:
            return {"nll": -made.distribution.log_prob(future)}
        return {}

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums of the mean over each window; with a mask ``observed`` is the sum of the shares of observed targets."""
        made: Forecasts = model(batch["past"], **model_inputs(batch), full=True)
        error = (made.point.float() - batch["future"]).double().flatten(1)
        spread = self._spread(made, batch["future"])
        seen = batch["future_mask"].flatten(1) if "future_mask" in batch else None

        def summed(values: Tensor) -> Tensor:
            return (values if seen is None else values.masked_fill(~seen, 0)).mean(1).sum()

        return {
            "count": torch.tensor(len(error), dtype=torch.float64),
            "squared": summed(error.square()),
            "absolute": summed(error.abs()),
            **{name: summed(values.double().flatten(1)) for name, values in spread.items()},
            **({} if seen is None else {"observed": seen.double().mean(1).sum()}),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over all observed targets of all windows; ``observed``: their share, where there may be holes."""
        count = sums["count"]
        held = sums.get("observed", count)
        if not held:
            raise UserError(f"{self.config.data.path}: a split without one observed target cannot be evaluated")  # type: ignore[attr-defined]
        mse = sums["squared"] / held
        spread: dict[str, float] = {name: sums[name] / held for name in ("pinball", "nll") if name in sums}
        share = {"observed": held / count} if "observed" in sums else {}
        return {"loss": mse, "mse": mse, "mae": sums["absolute"] / held, **spread, "samples": count, **share}

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
        """The last window of the test split: history, forecast and truth, in the units of the data."""
        source = self.series.test
        index = len(source) - 1
        batch = source.fetch(np.array([index]), None)
        batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
        forecast = model(batch["past"], **model_inputs(batch)).float()
        origin = self.series.origin(source, index)
        shown = _with_holes(batch)
        past, future, made = (origin.scaler.inverse(x[0].cpu().numpy()) for x in (*shown, forecast))
        path = folder / "forecast.png"
        draw_forecast(path, origin.labels, past, made, truth=future, stamps=origin.stamps)
        return [path]


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model takes beside the past, as far as the batch has it."""
    return {name: batch[name] for name in ("mask", "static", "known") if name in batch}


def _mean(values: Tensor, seen: Tensor) -> Tensor:
    """The mean over samples of the mean over what was ``seen`` (both (B, H, M)); a sample without any counts as 0.

    Not the mean over all that was seen: that would weigh samples by the micro-batch that they came in.
    """
    held = seen.flatten(1).sum(1).clamp(min=1)
    return (values.masked_fill(~seen, 0).flatten(1).sum(1) / held).mean()


def _with_holes(batch: Batch) -> tuple[Tensor, Tensor]:
    """Past and future with NaN where nothing was observed."""
    nothing = float("nan")
    pairs = (("past", "mask"), ("future", "future_mask"))
    past, future = (batch[x].masked_fill(~batch[m], nothing) if m in batch else batch[x] for x, m in pairs)
    return past, future
