"""What a run folder tells of its run, read with the least work: no torch, no schema, no more lines than are needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmtrain.errors import UserError
from mmtrain.runs import journal
from mmtrain.runs.journal import Line, sound_line

#: So many of the newest training lines are read for a table; a run may have written millions.
RECENT = 200

# libyaml's parser where PyYAML was built with it: ten times as fast
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder. ``written``: when it was last written to, in Unix seconds.

    ``waits``: how long each line of metrics that is not of training came after the line before it, in seconds.
    ``damaged``: the number of the first line of metrics that cannot be used.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    journal: list[Line] = field(default_factory=list)
    metrics: list[Line] = field(default_factory=list)
    result: Line | None = None
    written: float = 0.0
    waits: list[float] = field(default_factory=list)
    damaged: int | None = None

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of metrics of one kind, oldest first."""
        return [line for line in self.metrics if line.get("kind") == kind]

    def amount(self, dotted: str) -> float | None:
        """A value of the configuration that is a number above 0; None for others."""
        value = self.setting(dotted)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53
        return float(value) if fits else None

    def setting(self, dotted: str) -> Any:
        """A value of the configuration, such as ``train.epochs``; None where it is not there."""
        value: Any = self.settings
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def find_runs(root: Path) -> list[Path]:
    """The run folders under ``root``, oldest first.

    Raises:
        UserError: where there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; runs go to run_root (default: runs)")
    found = [path for path in root.glob("**/config.yaml") if "checkpoints" not in path.relative_to(root).parts]
    if not found:
        raise UserError(f"{root} holds no runs yet: start one with `mmtrain train --config NAME`")
    return [path.parent for path in sorted(found, key=_modified)]


def check_run_folder(path: str | Path) -> Path:
    """The run folder ``path``.

    Raises:
        UserError: when it is none.
    """
    if not (Path(path) / "config.yaml").is_file():
        raise UserError(f"{path} is no run folder: it has no config.yaml (list runs with `mmtrain runs`)")
    return Path(path)


def read_run(path: Path, recent: int | None = RECENT) -> RunRecord:
    """Read the run folder ``path``, with the newest ``recent`` training lines (None: all).

    What is torn or missing is left out: a run may be writing, or was killed while it did.
    """
    metrics, waits, damaged = _metrics(path / "metrics.jsonl", recent)
    return RunRecord(
        path=path,
        settings=_settings(path / "config.yaml"),
        journal=journal.read(path),
        metrics=metrics,
        result=_result(path / "result.json"),
        written=max(_modified(path / name) for name in ("metrics.jsonl", "config.yaml", journal.NAME)),
        waits=waits,
        damaged=damaged,
    )


def _metrics(file: Path, recent: int | None) -> tuple[list[Line], list[float], int | None]:
    try:
        content = file.read_text(errors="replace")
    except OSError:
        return [], [], None
    texts = content.splitlines()
    # by their text, which is quicker than to parse them: Tracker writes "kind" first
    train = [text.startswith('{"kind": "train"') for text in texts]
    first = len(texts) - recent if recent is not None else 0
    lines, waits = [], []
    before: Line | None = None
    damaged: int | None = None
    for i, text in enumerate(texts):
        wanted = i >= first or not train[i]
        if not wanted and train[i + 1]:
            continue
        line = sound_line(text)
        if line is None:
            being_written = i == len(texts) - 1 and not content.endswith("\n")
            damaged = damaged or (i + 1 if text.strip() and not being_written else None)
            continue
        if line["kind"] == "eval" and before is not None:
            waits.append(float(line.get("time", 0)) - float(before.get("time", 0)))
        before = line
        if wanted:
            lines.append(line)
    return lines, waits, damaged


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = yaml.load(file.read_text(), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _result(file: Path) -> Line | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
