"""Forecasts of all series of a prepared panel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.config import TSM2Config
from mmtrain.data.series.panel import Panel, find_panel, open_panel
from mmtrain.data.series.panel_inputs import PanelInputs, PanelScalers, StaticColumn, fit_scalers, unpack
from mmtrain.data.series.split import Scaler, check_scaler
from mmtrain.data.series.times import shown
from mmtrain.errors import UserError
from mmtrain.inference.folder import ASSETS, check_fits
from mmtrain.inference.trained import TrainedModel
from mmtrain.log import logger
from mmtrain.plotting.runs import draw_forecast

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 256


@dataclass(frozen=True)
class PanelForecast:
    """Forecast of S series, in units of the data.

    Attributes:
        ids: Ids of the series.
        columns: Names of the C targets.
        past: Lookback, (S, L, C).
        values: Forecast, (S, H, C).
        truth: Known values at the times of the forecast, (S, H, C); NaN where unknown.
        stamps: Times of the forecast, (S, H), or None for a panel without times. They are in UTC if there is a zone.
        left_out: Number of series that are shorter than the lookback.
        zone: Time zone of the panel, or None.
    """

    ids: list[str]
    columns: list[str]
    past: NDArray[np.floating]
    values: NDArray[np.float64]
    truth: NDArray[np.float64]
    stamps: NDArray[np.datetime64] | None
    left_out: int
    zone: str | None = None

    def table(self) -> pd.DataFrame:
        """Return a table with one row per series and time step: id, date (or number of the time step), and targets."""
        import pandas as pd  # imports slowly, and most uses of a model do not need it

        series, steps, _ = self.values.shape
        numbers = pd.Index(np.tile(np.arange(1, steps + 1), series))
        time = numbers if self.stamps is None else shown(self.stamps.reshape(-1), self.zone)
        head = {"id": np.repeat(self.ids, steps), "step" if self.stamps is None else "date": time}
        return pd.DataFrame({**head, **{name: self.values[:, :, i].ravel() for i, name in enumerate(self.columns)}})

    def draw(self, path: Path, most: int = 8) -> None:
        """Plot lookback, forecast and known values of the first target, for the first ``most`` series."""
        past, values, truth = (array[:most, :, 0].T for array in (self.past, self.values, self.truth))
        draw_forecast(path, self.ids[:most], past, values, truth=truth if np.isfinite(truth).any() else None)


@torch.no_grad()
def forecast_panel(trained: TrainedModel, folder: Path, back: int = 0, missing: str = "error") -> PanelForecast:
    """Forecast each series of the panel in ``folder``.

    A series of the training data is standardised as in training, a new one by its rows before the forecast.

    Args:
        trained: The trained model.
        folder: Folder of the panel.
        back: Number of rows between the end of the lookback and the end of a series.
        missing: "mask" to allow missing values in the lookback.

    Raises:
        UserError: If the model was not trained on a panel, the panel has other columns, the inputs known in advance end
            before the horizon, or values are missing in a lookback and ``missing`` is not "mask".
    """
    assets, model = trained.assets, cast(TSM2Config, trained.config.model)
    if trained.config.data.kind != "panel":
        raise UserError(f"{trained.folder}: this model was not trained on a panel. Give one CSV or parquet file")
    check_fits(assets, model, trained.folder)
    panel = open_panel(find_panel(folder))
    if panel.columns != assets["columns"]:
        raise UserError(
            f"{folder}: its columns are {panel.columns}, but the model was trained on {assets['columns']}. Prepare a"
            " panel with these columns (--columns)"
        )
    if back < 0:
        raise UserError(f"--back {back}: must be at least 0 (rows before the end)")
    trained.check_step(folder, None if panel.timeline is None else panel.timeline.step)
    ends = panel.lengths - back
    chosen = np.flatnonzero(ends >= model.lookback)
    if not len(chosen):
        raise UserError(
            f"{folder}: no series has the {model.lookback} rows of a lookback before the last {back} rows (--back)."
            " Lower --back, or use longer series"
        )
    inputs = _inputs(panel, assets, ends, model, trained.folder / ASSETS)
    _check_reach(panel, inputs, chosen, ends + model.horizon)
    masked = missing == "mask" or trained.config.data.missing == "mask"  # type: ignore[attr-defined]
    parts = [
        _forecast(trained.model, panel, inputs, some, ends[some], model, masked)
        for some in np.array_split(chosen, -(-len(chosen) // _BATCH))
    ]
    past, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    truth = np.full_like(values, np.nan)
    for position, number in enumerate(chosen.tolist()):
        known = panel.series(number)[int(ends[number]) : int(ends[number]) + model.horizon]
        truth[position, : len(known)] = known
    stamps = None
    if (line := panel.timeline) is not None:
        stamps = np.stack([line.stamps(start, model.horizon) for start in (panel.first + ends)[chosen].tolist()])
    return PanelForecast(
        panel.ids[chosen].tolist(),
        panel.columns,
        past,
        values,
        truth,
        stamps,
        len(panel) - len(chosen),
        panel.zone,
    )


def _inputs(
    panel: Panel, assets: dict[str, Any], ends: NDArray[np.int64], model: TSM2Config, where: Path
) -> PanelInputs:
    saved = _Saved.read(assets, where)
    inputs = PanelInputs(
        panel,
        _scalers(panel, saved, ends),
        steps=model.auxiliary.steps,
        known=saved.columns,
        calendar=saved.calendar,
        static=saved.static,
    )
    inputs.mean, inputs.std = saved.known.mean, saved.known.std
    if inputs.calendar_names and panel.timeline is None:
        raise UserError(
            f"{panel.folder}: the model needs calendar features, but this panel has no times. Prepare it with --time"
        )
    return inputs


@dataclass(frozen=True)
class _Saved:
    """Inputs of a run on a panel, from its assets. ``mean`` and ``std`` (S, C) are the scalers of ``ids``."""

    ids: list[str]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    calendar: list[str]
    columns: list[str]
    known: Scaler
    static: list[StaticColumn]

    @classmethod
    def read(cls, assets: dict[str, Any], where: Path) -> _Saved:
        """Parse the assets from the file ``where``.

        Raises:
            UserError: If they are damaged.
        """
        cure = "restore the file, or train or export again"
        try:
            known = assets["known"]
            saved = cls(
                [str(name) for name in assets["ids"]],
                unpack(assets["mean"]),
                unpack(assets["std"]),
                list(known["calendar"]),
                list(known["columns"]),
                Scaler.from_dict(known["scaler"], where),
                [StaticColumn.from_json(column) for column in assets["static"]],
            )
            wanted, found = (len(saved.ids), len(assets["columns"])), saved.mean.shape
            if found != wanted or len(saved.known.mean) != len(saved.columns):
                raise ValueError(f"scalers of shape {found} for {wanted[0]} series and {wanted[1]} columns")
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the file is damaged ({error!r}); {cure}") from None
        check_scaler(saved.mean, saved.std, f"{where}: the scalers are damaged", cure)
        return saved


def _scalers(panel: Panel, saved: _Saved, ends: NDArray[np.int64]) -> PanelScalers:
    mean, std = saved.mean, saved.std
    index = {name: number for number, name in enumerate(saved.ids)}
    found = np.array([index.get(name, -1) for name in panel.ids.tolist()], dtype=np.int64)
    new = found < 0
    if new.any():
        logger.warning(
            "%s: %d of %d series are not in the training data: they are standardised by their own mean and deviation",
            panel.folder,
            int(new.sum()),
            len(panel),
        )
        own = fit_scalers(panel, np.maximum(ends, 0))
        return PanelScalers(
            np.where(new[:, None], own.mean, mean[found]), np.where(new[:, None], own.std, std[found]), own.known
        )
    width = len(panel.known_columns) + len(panel.shared_columns)
    return PanelScalers(mean[found], std[found], Scaler(np.zeros(width), np.ones(width)))


def _check_reach(panel: Panel, inputs: PanelInputs, chosen: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
    """Raise UserError unless the inputs known in advance reach to the end of the horizon of each series."""
    short = int((panel.rows[chosen] < stop[chosen]).sum()) if inputs.own else 0
    if inputs.shared:
        short = max(short, int(((panel.first + stop)[chosen] > panel.shared.shape[1]).sum()))
    if short:
        names = ", ".join(inputs.names[len(inputs.calendar_names) :])
        raise UserError(
            f"{panel.folder}: {names} end before the horizon of {short} series. Prepare the panel with rows after the"
            " last target that contain them (or a longer --calendar), or use --back"
        )


def _forecast(
    model: torch.nn.Module,
    panel: Panel,
    inputs: PanelInputs,
    series: NDArray[np.int64],
    end: NDArray[np.int64],
    config: TSM2Config,
    masked: bool,
) -> tuple[NDArray[np.floating], NDArray[np.float64]]:
    """Return the lookback (B, L, C) and the forecast (B, H, C) of the given series, in units of the data."""
    past = panel.gather(panel.values, series, end - config.lookback, config.lookback)
    mean, std = inputs.scalers.mean[series][:, None], inputs.scalers.std[series][:, None]
    seen = np.isfinite(past)
    if not masked and not seen.all():
        name = panel.ids[series[int(np.argmin(seen.all(axis=(1, 2))))]]
        raise UserError(
            f"{panel.folder}: values are missing in the lookback of series {name}. Use --missing mask, or fill them"
        )
    given = {"past": torch.from_numpy(np.where(seen, (past - mean) / std, 0).astype(np.float32))}
    if masked:
        given["mask"] = torch.from_numpy(seen)
    given |= inputs.batch(series, end + config.horizon, len(panel.columns))
    return past, model(**given).float().numpy() * std + mean
