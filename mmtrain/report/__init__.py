"""One HTML file about one or several runs: nothing to serve, nothing to fetch, no script. Imports no torch.

``collect`` gathers what is shown as plain data, ``charts`` draws the curves, ``report.html.jinja`` lays out the page.
How a run folder is read, and what state a run is in, belongs in ``mmtrain.runs``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmtrain.errors import os_errors
from mmtrain.files import write_atomically
from mmtrain.report.charts import draw_chart
from mmtrain.report.collect import collect


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report on ``runs`` to ``out``; returns its path.

    Raises:
        UserError: when it cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("mmtrain.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = draw_chart
    template = environment.get_template("report.html.jinja")
    page = template.render(report=collect(runs), made=time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    with os_errors(f"{out} cannot be written", "choose another file with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    return out
