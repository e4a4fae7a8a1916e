"""The data of a forecasting run: a table or a panel, as its configuration says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mmtrain.config import PanelDataConfig, SeriesDataConfig, TSM2Config
from mmtrain.data.borders import SplitRule
from mmtrain.data.panel_data import PanelData, known_steps, load_panel
from mmtrain.data.series import SeriesData, load_series
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

Data = SeriesData | PanelData


def open_data(data: SeriesDataConfig, model: TSM2Config) -> Data:
    """Open what ``data`` names, cut into windows of ``model.lookback`` and ``model.horizon``.

    Raises:
        UserError: for data that is not there, is faulty, or does not fit.
    """
    root = data.root or os.environ.get("MMTRAIN_DATA") or "data"
    if isinstance(data, PanelDataConfig):
        return load_panel(data, model.lookback, model.horizon, model.future_length, root)
    return load_series(
        data.path,
        lookback=model.lookback,
        horizon=model.horizon,
        split=SplitRule.of(data),
        columns=data.columns,
        time_column=data.time_column,
        missing=data.missing,
        data_root=root,
        stride=data.stride,
        known=data.known,
        calendar=data.calendar,
        known_steps=known_steps(model.future_length, model.lookback, model.horizon),
    )


def check_inputs(data: Data, model: TSM2Config, path: str) -> None:
    """Does the model take what the data gives?

    Raises:
        UserError: with the keys to set.
    """
    static = {column.name: column.width for column in data.inputs.columns} if isinstance(data, PanelData) else {}
    known = data.inputs.names
    wrong: list[str] = []
    for key, has, wanted, what in (
        ("future_features", model.future_features, len(known), _named("known in advance", known)),
        ("static_features", model.static_features, sum(static.values()), _named("static", _widths(static))),
    ):
        if has != wanted:
            wrong.append(f"model.{key} is {has}, but the data gives {wanted} ({what}): set model.{key}={wanted}")
    if wrong:
        hint = "" if static or known else " (or name columns with data.known, data.static or data.calendar=true)"
        raise UserError(f"{path}: {'; '.join(wrong)}{hint}")


def _widths(static: dict[str, int]) -> list[str]:
    return [name if width == 1 else f"{name} × {width}" for name, width in static.items()]


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what}: {', '.join(names)}" if names else f"nothing {what}"
