"""Read a run folder quickly: without torch, without validating the configuration, and only as many lines as needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmtrain.errors import UserError
from mmtrain.runs import journal
from mmtrain.runs.journal import Line, sound_line

#: Number of newest training lines that are read for the table of runs. A run may have millions of lines.
RECENT = 200

# Use libyaml's parser, which is ten times as fast, if PyYAML was built with it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder.

    Attributes:
        settings: the configuration, not validated.
        journal: lines of the journal, oldest first.
        metrics: lines of metrics, oldest first.
        result: the result of a finished run, or None.
        written: time of the last write to the folder, in Unix seconds.
        waits: for each evaluation, the seconds between its line of metrics and the previous line.
        damaged: number of the first damaged line of metrics, or None.
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
        """Return the lines of metrics of one kind, oldest first."""
        return [line for line in self.metrics if line.get("kind") == kind]

    def amount(self, dotted: str) -> float | None:
        """Return a value of the configuration if it is a positive number, otherwise None."""
        value = self.setting(dotted)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53
        return float(value) if fits else None

    def setting(self, dotted: str) -> Any:
        """Return a value of the configuration, such as ``train.epochs``, or None if it is not there."""
        value: Any = self.settings
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def find_runs(root: Path) -> list[Path]:
    """Find the run folders under ``root``, oldest first.

    Raises:
        UserError: if the folder does not exist or contains no run.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Runs are stored in the folder that run_root names (default: runs)")
    found = [path for path in root.glob("**/config.yaml") if "checkpoints" not in path.relative_to(root).parts]
    if not found:
        raise UserError(f"{root} contains no runs. Start one with `mmtrain submit --config NAME --local 1`")
    return [path.parent for path in sorted(found, key=_modified)]


def check_run_folder(path: str | Path) -> Path:
    """Check that ``path`` is a run folder, and return it.

    Raises:
        UserError: if it is not.
    """
    if not (Path(path) / "config.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it contains no config.yaml. List runs with `mmtrain runs`")
    return Path(path)


def read_run(path: Path, recent: int | None = RECENT) -> RunRecord:
    """Read the run folder ``path``, with the newest ``recent`` training lines (None: all).

    Missing files and incomplete lines are skipped, since the run may be writing or may have been killed while writing.
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
    """Read the lines of metrics, the waits and the number of the first damaged line, as in :class:`RunRecord`."""
    try:
        content = file.read_text(errors="replace")
    except OSError:
        return [], [], None
    texts = content.splitlines()
    # Comparing the text is faster than parsing. Tracker writes "kind" first.
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
