"""HTML report of one or several runs: a single file without scripts and without links to other files.

``collect`` gathers the content as plain data, ``charts`` draws the curves, and ``report.html.jinja`` is the page's
layout. ``mmtrain.runs`` reads run folders and determines the state of runs. Nothing here imports torch.
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
    """Write the report of the run folders ``runs`` to the file ``out`` and return its path.

    Raises:
        UserError: If the file cannot be written.
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
    page = template.render(report=collect(runs), created=time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    with os_errors(f"--out {out}: cannot be written", "choose another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    return out
