"""Predictions of a trained model: the classes of images, and the future of a table of series."""

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
    """The ``top`` classes and their probabilities for each image file.

    Raises:
        UserError: for a model that is no classifier, or a file that is no image.
    """
    if trained.config.task.kind != "classification":
        raise UserError(f"{trained.folder} holds a model for {trained.config.task.kind}, which takes no images")
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
            raise UserError(f"{path}: {error.strerror or 'not an image that can be read'}") from None
        except ValueError as error:
            raise UserError(f"{path}: not an image that can be read ({error})") from None
        probabilities = trained.model(transform([image], None))[0].softmax(-1)
        values, indices = probabilities.topk(min(top, len(probabilities)))
        found.append([(assets["classes"][i], v) for v, i in zip(values.tolist(), indices.tolist(), strict=True)])
    return found


@dataclass(frozen=True)
class Forecast:
    """past (lookback, M), values (horizon, M), truth the same or None where not known, all in units of the data."""

    columns: list[str]
    past: NDArray[np.float64]
    values: NDArray[np.float64]
    truth: NDArray[np.float64] | None
    stamps: NDArray[np.datetime64] | None  # in UTC where there is a zone
    zone: str | None = None

    def table(self) -> pd.DataFrame:
        """One row for each step: its date, where there are times, and a column for each variate."""
        import pandas as pd  # starts slowly, and most uses of a model need none

        table = pd.DataFrame(self.values, columns=self.columns)
        if self.stamps is not None:
            table.insert(0, "date", shown(self.stamps[-len(self.values) :], self.zone))
        return table

    def draw(self, path: Path) -> None:
        """History, forecast and what is known of the truth."""
        stamps = None if self.stamps is None else shown(self.stamps, self.zone).tz_localize(None).to_numpy()
        draw_forecast(path, self.columns, self.past, self.values, truth=self.truth, stamps=stamps)


@torch.no_grad()
def forecast(
    trained: TrainedModel, path: Path, back: int = 0, missing: str = "error", form: TableFormat | None = None
) -> Forecast:
    """Forecast the series in ``path`` from ``back`` rows before its end; those rows, where known, are the truth.

    Columns that the model knows in advance must be given for the horizon too: in rows at the end of the file that leave
    the other columns empty, or with ``back``. ``missing``: as ``data.missing``. ``form``: how the file
    is written, in what differs from the run's.

    Raises:
        UserError: for a model that makes no forecasts, a file with too few rows, or other columns than those that the
            model was trained on.
    """
    if trained.config.task.kind != "forecasting":
        raise UserError(f"{trained.folder} holds a model for {trained.config.task.kind}, which makes no forecasts")
    if trained.config.data.kind == "panel":
        raise UserError(f"{trained.folder} was trained on a panel: give a folder made by mmtrain data prepare panel")
    check_fits(trained.assets, trained.config.model, trained.folder)
    known, beside = trained.assets["columns"], trained.assets.get("known", {"columns": []})
    data = cast(SeriesDataConfig, trained.config.data)
    try:
        table = read_table(
            path,
            columns=data.columns,
            missing=missing,
            time_column=data.time_column,
            known=beside["columns"],
            form=TableFormat.of(data).but(form),
        )
    except UserError as error:  # what is a key in training is a flag here
        text = str(error).replace("data.missing=", "--missing ").replace("data.duplicates=", "--duplicates ")
        raise UserError(text) from None
    _check_columns(path, list(table.columns), known)
    trained.check_step(path, table.step)
    values = table.values[:, [list(table.columns).index(name) for name in known]]
    lookback, horizon = trained.assets["lookback"], trained.assets["horizon"]
    end = len(values) - back
    if back < 0 or end < lookback:
        raise UserError(
            f"{path} has {len(values)} rows: a look-back of {lookback} ending {back} rows before the end does not fit"
            " (see --back)"
        )
    scaler = Scaler.from_dict(trained.assets["scaler"], trained.folder / ASSETS)
    past = values[end - lookback : end]
    scaled = scaler.transform(past)
    seen = np.isfinite(scaled)
    inputs = {"past": torch.from_numpy(np.where(seen, scaled, np.float32(0)))[None]}
    if missing == "mask":
        inputs["mask"] = torch.from_numpy(seen)[None]
    if beside["columns"] or beside.get("calendar"):
        steps = cast(ForecasterConfig, trained.config.model).auxiliary.steps
        saved = Scaler.from_dict(beside["scaler"], trained.folder / ASSETS)
        inputs["known"] = _known_until(table, beside, saved, end + horizon, steps, len(known))
    made = trained.model(**inputs)[0].float().numpy()
    truth = values[end : end + horizon] if back else None
    if truth is not None and len(truth) < horizon:
        truth = np.concatenate([truth, np.full((horizon - len(truth), len(known)), np.nan)])
    stamps = None if table.stamps is None else continued(table.stamps, end + horizon, table.zone)
    covered = None if stamps is None else stamps[end - lookback : end + horizon]
    return Forecast(list(known), past, scaler.inverse(made), truth, covered, table.zone)


def _check_columns(path: Path, there: list[str], known: list[str]) -> None:
    extra = [name for name in there if name not in known]
    lacking = [name for name in known if name not in there]
    if extra or lacking:
        parts = [f"it lacks {', '.join(lacking[:8])}"] if lacking else []
        parts += [f"it has {', '.join(extra[:8])}{' …' if len(extra) > 8 else ''} besides"] if extra else []
        raise UserError(
            f"{path}: its {len(there)} variates are not the {len(known)} that the model was trained on"
            f" ({', '.join(known[:8])}): {'; '.join(parts)}. Give a file with just those columns, or train on this one"
        )


def _known_until(
    table: SeriesTable, saved: dict[str, Any], scaler: Scaler, stop: int, steps: int, variates: int
) -> Tensor:
    """(1, steps, M, C_Z): the inputs known in advance of the rows before ``stop``, which may lie behind the table.

    Args:
        saved: the calendar features and columns that the model was trained with, as in its assets.
        scaler: that of the columns.

    Raises:
        UserError: for known columns that do not reach so far, or a table without times where they are needed.
    """
    rows = len(table.values) if table.known is None else len(table.known)
    if saved["columns"] and stop > rows:
        raise UserError(
            f"{table.path}: the model needs {', '.join(saved['columns'])} for the {stop - rows} step(s) behind the "
            "last row: add rows at the end with them and leave the other columns empty, or use --back"
        )
    known = np.empty((max(rows, stop), 0)) if table.known is None else table.known
    whole = replace(table, stamps=None if table.stamps is None else continued(table.stamps, len(known), table.zone))
    matrix = build_matrix(whole, list(saved["calendar"]), known, scaler)
    return known_batch(matrix[None, stop - steps : stop], variates)
