"""Every picture: curves, forecasts, confusion matrices, splits, averaging weights and selections.

The functions take plain arrays and write a PNG; they know no model, no run and no data source. This module holds the
helpers that they share. matplotlib is imported here alone, and only when a figure is made, since it starts slowly.

Text in a picture is shown as it is written: names of columns and classes may hold what matplotlib takes for a formula.
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

#: Colours of the observed past, of a forecast, and of the values that followed.
HISTORY, FORECAST, TRUTH = "#5b6770", "#d1495b", "#2e86ab"


#: The pictures whose failure was told.
_told: set[Path] = set()


def load_matplotlib() -> Any:
    """matplotlib itself. A backend in MPLBACKEND that it does not know is left out: files need none of them."""
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
    """Call ``draw``, which writes the picture ``path``; False where it failed, which is told once.

    A picture never ends what it is a picture of.
    """
    try:
        draw()
    except Exception as error:  # whatever matplotlib, a font or a full disk comes up with
        if path not in _told:
            _told.add(path)
            logger.warning("%s could not be drawn, and is left out (%s: %s)", path, type(error).__name__, error)
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches.

    pyplot is not used: it would look for a display and keep every figure.
    """
    load_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_axes(figure: Figure, rows: int = 1, columns: int = 1) -> list[Axes]:
    """A grid of axes for lines: without top and right spines, with faint grid lines; row by row."""
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return axes


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG of 110 dots per inch to ``path``; an older file there is replaced."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_usetex(False)
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")  # it is drawn as a box
        figure.savefig(path, dpi=110)
