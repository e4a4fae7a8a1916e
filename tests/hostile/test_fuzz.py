"""The search for faults in readers runs, and finds one that is put in."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.data.images import tar_index
from tests.hostile.fuzz import search
from tests.hostile.targets import Target, make_targets

TARGETS = ("configs", "tables", "tars", "indexes", "checkpoints", "exports", "arguments")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused(
    name: str, targets: dict[str, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tried, findings = search(name, targets[name], 60, start=7, examples=30)
    assert tried >= 30
    assert findings == []


def test_every_target_is_searched(targets: dict[str, Target]) -> None:
    assert tuple(targets) == TARGETS


def test_a_fault_is_found_once_and_made_small(targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(*arguments: object, **options: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(tar_index, "_walk", walk)
    _, findings = search("tars", targets["tars"], 60, start=7, examples=50)
    assert [finding.error for finding in findings] == ["KeyError: 'planted'"]
    assert "walk" in findings[0].place
    assert findings[0].case.startswith("b'")
