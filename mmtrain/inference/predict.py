"""Predictions of a trained model: classes of images, and forecasts of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmtrain.config import ForecasterConfig, SeriesDataConfig
from mmtrain.data.images.photo import decode
from mmtrain.data.images.transforms import build_transform
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.split import Scaler
from mmtrain.data.series.table import SeriesTable, read_table
from mmtrain.data.series.table_source import build_matrix
from mmtrain.data.series.timeline import continued
from mmtrain.data.series.times import shown
from mmtrain.data.series.windows import known_batch
from mmtrain.errors import UserError
from mmtrain.inference.folder import ASSETS, check_fits
from mmtrain.inference.trained import TrainedModel
from mmtrain.plotting.runs import draw_forecast

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def classify(trained: TrainedModel, paths: Sequence[Path], top: int = 5) -> list[list[tuple[str, float]]]:
    """Return the ``top`` most probable classes of each image file, with their probabilities.

    Raises:
        UserError: If the model is no classifier, or a file is no readable image.
    """
    if trained.config.task.kind != "classification":
        raise UserError(
            f"{trained.folder} contains a model for {trained.config.task.kind}, which does not take images. Use a run"
            " that was trained on images"
        )
    assets = trained.assets
    check_fits(assets, trained.config.model, trained.folder)
    transform = build_transform(
        False, assets["image_size"], mean=assets["mean"], std=assets["std"], crop_pct=assets["crop_pct"]
    )
    found = []
    for path in paths:
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or 'not a readable image'}") from None
        except ValueError as error:
            raise UserError(f"{path}: not a readable image ({error})") from None
        probabilities = trained.model(transform([image], None))[0].softmax(-1)
        values, indices = probabilities.topk(min(top, len(probabilities)))
        found.append([(assets["classes"][i], v) for v, i in zip(values.tolist(), indices.tolist(), strict=True)])
    return found


@dataclass(frozen=True)
class Forecast:
    """Forecast of M variates, in units of the data.

    Attributes:
        columns: Names of the variates.
        past: Lookback, (lookback, M).
        values: Forecast, (horizon, M).
        truth: Known values at the times of the forecast, (horizon, M), NaN where unknown; None without any.
        stamps: Times of lookback and horizon, or None for a table without times. They are in UTC if there is a zone.
        zone: Time zone of the table, or None.
    """

    columns: list[str]
    past: NDArray[np.float64]
    values: NDArray[np.float64]
    truth: NDArray[np.float64] | None
    stamps: NDArray[np.datetime64] | None
    zone: str | None = None

    def table(self) -> pd.DataFrame:
        """Return a table with one row per time step: its date, if there are times, and a column per variate."""
        import pandas as pd  # imports slowly, and most uses of a model do not need it

        table = pd.DataFrame(self.values, columns=self.columns)
        if self.stamps is not None:
            table.insert(0, "date", shown(self.stamps[-len(self.values) :], self.zone))
        return table

    def draw(self, path: Path) -> None:
        """Plot lookback, forecast and known values to the file ``path``."""
        stamps = None if self.stamps is None else shown(self.stamps, self.zone).tz_localize(None).to_numpy()
        draw_forecast(path, self.columns, self.past, self.values, truth=self.truth, stamps=stamps)


@torch.no_grad()
def forecast(
    trained: TrainedModel, path: Path, back: int = 0, missing: str = "error", form: TableFormat | None = None
) -> Forecast:
    """Forecast the table ``path``.

    Inputs known in advance must be given for the horizon too: in rows at the end of the file whose other columns are
    empty, or with ``back``.

    Args:
        trained: The trained model.
        path: A CSV or parquet file.
        back: Number of rows between the end of the lookback and the end of the file. They become the truth.
        missing: Treatment of missing values, as in ``data.missing``.
        form: Format of the file, where it differs from that of the training data.

    Raises:
        UserError: If the model is no forecaster, the file has too few rows, or its columns are not those that the model
            was trained on.
    """
    if trained.config.task.kind != "forecasting":
        raise UserError(
            f"{trained.folder} contains a model for {trained.config.task.kind}, which makes no forecasts. Use a run"
            " that was trained on series"
        )
    if trained.config.data.kind == "panel":
        raise UserError(
            f"{trained.folder}: this model was trained on a panel. Give a folder written by mmtrain data prepare panel"
        )
    check_fits(trained.assets, trained.config.model, trained.folder)
    known, in_advance = trained.assets["columns"], trained.assets.get("known", {"columns": []})
    data = cast(SeriesDataConfig, trained.config.data)
    try:
        table = read_table(
            path,
            columns=data.columns,
            missing=missing,
            time_column=data.time_column,
            known=in_advance["columns"],
            form=TableFormat.of(data).but(form),
        )
    except UserError as error:  # name the flags of mmtrain predict instead of the keys of a configuration
        text = str(error).replace("data.missing=", "--missing ").replace("data.duplicates=", "--duplicates ")
        raise UserError(text) from None
    _check_columns(path, list(table.columns), known)
    trained.check_step(path, table.step)
    values = table.values[:, [list(table.columns).index(name) for name in known]]
    lookback, horizon = trained.assets["lookback"], trained.assets["horizon"]
    end = len(values) - back
    if back < 0 or end < lookback:
        raise UserError(
            f"{path}: {len(values)} rows are too few for a lookback of {lookback} rows before the last {back} rows"
            " (--back). Lower --back, or give a longer file"
        )
    scaler = Scaler.from_dict(trained.assets["scaler"], trained.folder / ASSETS)
    past = values[end - lookback : end]
    scaled = scaler.transform(past)
    seen = np.isfinite(scaled)
    inputs = {"past": torch.from_numpy(np.where(seen, scaled, np.float32(0)))[None]}
    if missing == "mask":
        inputs["mask"] = torch.from_numpy(seen)[None]
    if in_advance["columns"] or in_advance.get("calendar"):
        steps = cast(ForecasterConfig, trained.config.model).auxiliary.steps
        saved = Scaler.from_dict(in_advance["scaler"], trained.folder / ASSETS)
        inputs["known"] = _known_until(table, in_advance, saved, end + horizon, steps, len(known))
    output = trained.model(**inputs)[0].float().numpy()
    truth = values[end : end + horizon] if back else None
    if truth is not None and len(truth) < horizon:
        truth = np.concatenate([truth, np.full((horizon - len(truth), len(known)), np.nan)])
    stamps = None if table.stamps is None else continued(table.stamps, end + horizon, table.zone)
    covered = None if stamps is None else stamps[end - lookback : end + horizon]
    return Forecast(list(known), past, scaler.inverse(output), truth, covered, table.zone)


def _check_columns(path: Path, found: list[str], known: list[str]) -> None:
    extra = [name for name in found if name not in known]
    lacking = [name for name in known if name not in found]
    if extra or lacking:
        parts = [f"it lacks {', '.join(lacking[:8])}"] if lacking else []
        parts += [f"it also has {', '.join(extra[:8])}{' …' if len(extra) > 8 else ''}"] if extra else []
        raise UserError(
            f"{path}: its {len(found)} variates are not the {len(known)} that the model was trained on"
            f" ({', '.join(known[:8])}): {'; '.join(parts)}. Give a file with exactly those columns, or train on this"
            " file"
        )


def _known_until(
    table: SeriesTable, saved: dict[str, Any], scaler: Scaler, stop: int, steps: int, variates: int
) -> Tensor:
    """Return the inputs known in advance for the last ``steps`` rows before ``stop``, (1, steps, M, C_Z).

    Args:
        table: The table.
        saved: Calendar features and columns that the model was trained with, from its assets.
        scaler: Scaler of these columns.
        stop: The row after the last one. It may be after the end of the table.
        steps: Number of rows.
        variates: Number of variates M.

    Raises:
        UserError: If the columns end before ``stop``, or times are needed but the table has none.
    """
    rows = len(table.values) if table.known is None else len(table.known)
    if saved["columns"] and stop > rows:
        raise UserError(
            f"{table.path}: the model needs {', '.join(saved['columns'])} for {stop - rows} time step(s) after the last"
            " row. Add rows at the end with values in these columns only, or use --back to forecast earlier rows"
        )
    known = np.empty((max(rows, stop), 0)) if table.known is None else table.known
    whole = replace(table, stamps=None if table.stamps is None else continued(table.stamps, len(known), table.zone))
    matrix = build_matrix(whole, list(saved["calendar"]), known, scaler)
    return known_batch(matrix[None, stop - steps : stop], variates)
