"""Forecast every series of a prepared panel with a trained model."""

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
    """``past`` (S, L, C), ``values`` (S, H, C) and ``truth`` (S, H, C; NaN where not known), in units of the data.

    ``stamps`` (S, H): times of the forecasts (in UTC where there is a ``zone``), or None for a panel without times.
    ``left_out``: series too short.
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
        """One row for each series and step: id, date (or the number of the step), a column for each target."""
        import pandas as pd  # starts slowly, and most uses of a model need none

        series, steps, _ = self.values.shape
        steps_of = pd.Index(np.tile(np.arange(1, steps + 1), series))
        time = steps_of if self.stamps is None else shown(self.stamps.reshape(-1), self.zone)
        head = {"id": np.repeat(self.ids, steps), "step" if self.stamps is None else "date": time}
        return pd.DataFrame({**head, **{name: self.values[:, :, i].ravel() for i, name in enumerate(self.columns)}})

    def draw(self, path: Path, most: int = 8) -> None:
        """The first target of the first series: history, forecast and what is known of the truth."""
        past, values, truth = (array[:most, :, 0].T for array in (self.past, self.values, self.truth))
        draw_forecast(path, self.ids[:most], past, values, truth=truth if np.isfinite(truth).any() else None)


@torch.no_grad()
def forecast_panel(trained: TrainedModel, folder: Path, back: int = 0, missing: str = "error") -> PanelForecast:
    """Forecast each series of the panel in ``folder`` from ``back`` rows before its end.

    A series is standardised as in training; one that the model was not trained on by its own rows before the forecast.

    Raises:
        UserError: for a model that was not trained on a panel, a panel of other columns, one without what the model
            knows in advance for the steps to forecast, or with holes in a look-back, unless ``missing`` is mask.
    """
    assets, model = trained.assets, cast(TSM2Config, trained.config.model)
    if trained.config.data.kind != "panel":
        raise UserError(f"{trained.folder} was not trained on a panel: give one CSV or parquet file")
    check_fits(assets, model, trained.folder)
    panel = open_panel(find_panel(folder))
    if panel.columns != assets["columns"]:
        raise UserError(f"{folder}: its columns are {panel.columns}, the model was trained on {assets['columns']}")
    if back < 0:
        raise UserError(f"--back {back}: rows before the end, 0 or more")
    trained.check_step(folder, None if panel.timeline is None else panel.timeline.step)
    ends = panel.lengths - back
    chosen = np.flatnonzero(ends >= model.lookback)
    if not len(chosen):
        raise UserError(
            f"{folder}: no series has a look-back of {model.lookback} rows ending {back} rows before its end (--back)"
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
    for place, number in enumerate(chosen.tolist()):
        there = panel.series(number)[int(ends[number]) : int(ends[number]) + model.horizon]
        truth[place, : len(there)] = there
    stamps = None
    if (line := panel.timeline) is not None:
        stamps = np.stack([line.stamps(place, model.horizon) for place in (panel.first + ends)[chosen].tolist()])
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
        raise UserError(f"{panel.folder}: the model takes calendar features, and this panel was prepared without times")
    return inputs


@dataclass(frozen=True)
class _Saved:
    """What the assets of a run on a panel say of its inputs. ``mean`` and ``std`` (S, C): of the series ``ids``."""

    ids: list[str]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    calendar: list[str]
    columns: list[str]
    known: Scaler
    static: list[StaticColumn]

    @classmethod
    def read(cls, assets: dict[str, Any], where: Path) -> _Saved:
        """Raises UserError for assets that are damaged; ``where`` is their file."""
        cure = "restore the file, or train or export again"
        try:
            known = assets["known"]
            made = cls(
                [str(name) for name in assets["ids"]],
                unpack(assets["mean"]),
                unpack(assets["std"]),
                list(known["calendar"]),
                list(known["columns"]),
                Scaler.from_dict(known["scaler"], where),
                [StaticColumn.from_json(column) for column in assets["static"]],
            )
            wanted, found = (len(made.ids), len(assets["columns"])), made.mean.shape
            if found != wanted or len(made.known.mean) != len(made.columns):
                raise ValueError(f"scalers of shape {found} for {wanted[0]} series and {wanted[1]} columns")
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: it is damaged ({error!r}); {cure}") from None
        check_scaler(made.mean, made.std, f"{where}: the scalers are damaged", cure)
        return made


def _scalers(panel: Panel, saved: _Saved, ends: NDArray[np.int64]) -> PanelScalers:
    mean, std = saved.mean, saved.std
    place = {name: number for number, name in enumerate(saved.ids)}
    found = np.array([place.get(name, -1) for name in panel.ids.tolist()], dtype=np.int64)
    fresh = found < 0
    if fresh.any():
        logger.warning(
            "%s: the model was not trained on %d of %d series: they are standardised by their own rows",
            panel.folder,
            int(fresh.sum()),
            len(panel),
        )
        own = fit_scalers(panel, np.maximum(ends, 0))
        return PanelScalers(
            np.where(fresh[:, None], own.mean, mean[found]), np.where(fresh[:, None], own.std, std[found]), own.known
        )
    width = len(panel.known_columns) + len(panel.shared_columns)
    return PanelScalers(mean[found], std[found], Scaler(np.zeros(width), np.ones(width)))


def _check_reach(panel: Panel, inputs: PanelInputs, chosen: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
    """What is known in advance must be there for the steps to forecast."""
    short = int((panel.rows[chosen] < stop[chosen]).sum()) if inputs.own else 0
    if inputs.shared:
        short = max(short, int(((panel.first + stop)[chosen] > panel.shared.shape[1]).sum()))
    if short:
        names = ", ".join(inputs.names[len(inputs.calendar_names) :])
        raise UserError(
            f"{panel.folder}: for {short} series {names} are not known for all steps to forecast: prepare the panel "
            "with rows for them behind the last target (or a longer --calendar), or use --back"
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
    """Past (B, L, C) and forecast (B, H, C) of some series, in units of the data."""
    past = panel.gather(panel.values, series, end - config.lookback, config.lookback)
    mean, std = inputs.scalers.mean[series][:, None], inputs.scalers.std[series][:, None]
    seen = np.isfinite(past)
    if not masked and not seen.all():
        name = panel.ids[series[int(np.argmin(seen.all(axis=(1, 2))))]]
        raise UserError(f"{panel.folder}: the look-back of series {name} has holes: give --missing mask, or fill them")
    given = {"past": torch.from_numpy(np.where(seen, (past - mean) / std, 0).astype(np.float32))}
    if masked:
        given["mask"] = torch.from_numpy(seen)
    given |= inputs.batch(series, end + config.horizon, len(panel.columns))
    return past, model(**given).float().numpy() * std + mean
