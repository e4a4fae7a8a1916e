"""From run folders to the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.report import config, curves, jobs, pictures, speed, summary
from mmtrain.report.html import page
from mmtrain.report.model import Shown, distinct_names
from mmtrain.runs.reader import read_run
from mmtrain.runs.status import observe, status


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report on ``runs`` to ``out``; returns its path.

    Raises:
        UserError: when it cannot be written.
    """
    facts = [read_run(path, recent=None) for path in dict.fromkeys(runs)]
    world = observe(facts)
    names = distinct_names([each.path for each in facts])
    shown = [Shown(name, each, status(each, world), i) for i, (name, each) in enumerate(zip(names, facts, strict=True))]
    sections = [
        ("Runs", summary.section(shown)),
        ("Curves", curves.section(shown)),
        ("Pictures", pictures.section(shown)),
        ("Speed", speed.section(shown)),
        ("Configuration", config.section(shown)),
        ("Jobs", jobs.section(shown)),
        ("Faults in the data", jobs.faults(shown)),
    ]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page(title, sections), encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another file with --out") from None
    return out
