"""The configurations: where they differ, and whole on a click."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtrain.report.html import Markup, element, folded, joined, table
from mmtrain.report.model import Shown


def section(runs: Sequence[Shown]) -> Markup:
    """Keys whose values differ between the runs, then every configuration as it stands in its folder."""
    parts = []
    if len(runs) > 1:
        flat = [flattened(run.facts.settings) for run in runs]
        rows = differing(flat)
        if rows:
            parts.append(table(["key", *(run.name for run in runs)], rows))
        else:
            parts.append(element("p", "The runs have the same configuration."))
    parts += [folded(f"{run.name}: config.yaml", _text(run)) for run in runs]
    return joined(parts)


def differing(flat: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """A row a key that is not the same everywhere: the key, and its value in each configuration."""
    keys = dict.fromkeys(key for each in flat for key in each)
    missing = object()
    rows: list[list[object]] = []
    for key in sorted(keys):
        values = [each.get(key, missing) for each in flat]
        if any(value != values[0] for value in values):
            rows.append([key, *("–" if value is missing else _value(value) for value in values)])
    return rows


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train.epochs": 3, …}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _value(value: Any) -> Markup:
    return element("code", "null" if value is None else value)


def _text(run: Shown) -> str:
    try:
        return (run.facts.path / "config.yaml").read_text(errors="replace")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
