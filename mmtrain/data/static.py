"""Static columns of a panel as numbers: categories one-hot (many of them as one code), numbers standardised."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.errors import UserError, nearest

if TYPE_CHECKING:
    from mmtrain.data.panel import Panel

#: A category of more values than this becomes one number, its code, instead of so many columns.
MOST_ONE_HOT = 64
_log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class StaticColumn:
    """How one column is turned into numbers: ``categories``, or else ``mean`` and ``std``."""

    name: str
    categories: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def width(self) -> int:
        return len(self.categories) if 0 < len(self.categories) <= MOST_ONE_HOT else 1

    def encode(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Numbers (S,), or codes of ``categories`` (S,; below 0: none of them) → (S, width) float32."""
        if not self.categories:
            made = (values.astype(np.float64) - self.mean) / self.std
            made[~np.isfinite(made)] = 0  # a number that is not given: the mean
            return made[:, None].astype(np.float32)
        if self.width == 1 and len(self.categories) > 1:
            return (values[:, None] / (len(self.categories) - 1) - 0.5).astype(np.float32)
        return (values[:, None] == np.arange(len(self.categories))).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "categories": list(self.categories), "mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> StaticColumn:
        return cls(str(saved["name"]), tuple(saved["categories"]), float(saved["mean"]), float(saved["std"]))


def fit_static(panel: Panel, names: Sequence[str], trained: NDArray[np.bool_]) -> list[StaticColumn]:
    """The encodings of the columns ``names``; numbers are standardised by the series that are ``trained`` (S,) on.

    Raises:
        UserError: for a column that the panel does not have.
    """
    columns = []
    for name in names:
        if name not in panel.statics:
            raise UserError(
                f"{panel.folder}: data.static: {name!r} is not there{nearest(name, panel.statics)}; its static columns "
                f"are {', '.join(panel.statics) or 'none: prepare it with --static'}"
            )
        if name in panel.categories:
            column = StaticColumn(name, tuple(panel.categories[name]))
            if column.width == 1 and len(column.categories) > 1:
                _log.info(
                    "%s: static column %r has %d values, more than %d: it becomes one number, the code of the value",
                    panel.folder,
                    name,
                    len(column.categories),
                    MOST_ONE_HOT,
                )
            columns.append(column)
            continue
        values = panel.statics[name][trained].astype(np.float64)
        good = values[np.isfinite(values)]
        mean, std = (float(good.mean()), float(good.std())) if len(good) else (0.0, 1.0)
        columns.append(StaticColumn(name, (), mean, std if std > 1e-6 * abs(mean) else 1.0))
    return columns


def encode_static(panel: Panel, columns: Sequence[StaticColumn]) -> NDArray[np.float32]:
    """(S, C_S) float32, the columns side by side."""
    parts = []
    for column in columns:
        values = panel.statics.get(column.name)
        if values is None or bool(panel.categories.get(column.name)) != bool(column.categories):
            raise UserError(f"{panel.folder}: it has no static column {column.name!r} of the kind that was trained on")
        if column.categories:
            there = panel.categories[column.name]
            codes = {name: code for code, name in enumerate(column.categories)}
            values = np.array([codes.get(name, -1) for name in there], dtype=np.int64)[values]
        parts.append(column.encode(values))
    return np.concatenate(parts, axis=1) if parts else np.empty((len(panel), 0), dtype=np.float32)
