"""The pictures of the run folders, put into the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from mmtrain.report.html import Markup, dot, element, joined
from mmtrain.report.model import Shown

#: A larger file is named, not shown: a report can be sent by mail.
_MOST_BYTES = 4 * 2**20
#: Drawn by the trainer; the report has its own curves.
_CURVES = "curves.png"
_PNG = b"\x89PNG\r\n\x1a\n"


def section(runs: Sequence[Shown]) -> Markup:
    """Forecasts, confusion matrices and whatever else a run has drawn."""
    parts: list[Markup] = []
    for run in runs:
        for file in sorted(run.facts.path.glob("*.png")):
            if file.name != _CURVES and (shown := _picture(file)):
                parts += [element("h3", dot(run.color), f"{run.name}: {file.stem.replace('_', ' ')}"), shown]
    return joined(parts)


def _picture(file: Path) -> Markup | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG):  # a partial file
        return None
    if len(content) > _MOST_BYTES:
        return element("p", f"{file} is too large to be shown here ({len(content) / 2**20:.0f} MiB)")
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return element("img", alt=file.stem, src=source)
