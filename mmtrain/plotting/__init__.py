"""All plots: training curves, forecasts, confusion matrices, splits, averaging weights and selection maps.

The functions take arrays and write PNG files. They do not depend on models, runs or data sources. This module contains
their common helpers. matplotlib is imported only when a figure is created, because its import is slow.

Text in plots is not interpreted as mathematical formulas, because names of columns and classes may contain ``$``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.log import logger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of past values, of forecasts and of true values.
HISTORY, FORECAST, TRUTH = "#5b6770", "#d1495b", "#2e86ab"


#: The plots for which a failure was logged.
_logged: set[Path] = set()


def load_matplotlib() -> Any:
    """Import matplotlib and return it. An unknown backend in MPLBACKEND is ignored: writing files needs no backend."""
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        try:
            matplotlib.rcParams["backend"] = backend
        except ValueError:
            logger.debug("MPLBACKEND=%s: matplotlib has no such backend", backend)
    return matplotlib


def try_to_draw(path: Path, draw: Callable[[], object]) -> bool:
    """Call ``draw``, which writes the plot ``path``, and return whether it succeeded.

    A failure is logged once for each path and does not stop the run or the command.
    """
    try:
        draw()
    except Exception as error:  # errors of matplotlib, of fonts or of a full disk
        if path not in _logged:
            _logged.add(path)
            logger.warning("%s: plot skipped, because drawing it failed (%s: %s)", path, type(error).__name__, error)
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches.

    pyplot is not used, because it needs a display and keeps references to all figures.
    """
    load_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_axes(figure: Figure, rows: int = 1, columns: int = 1) -> list[Axes]:
    """Add a grid of axes for line plots and return them row by row. They have no top and right spines."""
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return axes


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` as a PNG with 110 dots per inch. An existing file is replaced."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_usetex(False)
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")  # a missing glyph is drawn as a box
        figure.savefig(path, dpi=110)
