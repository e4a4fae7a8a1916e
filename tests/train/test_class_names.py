"""A class number means what it meant when the run was trained, or nothing is measured and nothing is trained."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.train.session import train

NAMES = [f"animal {number}" for number in range(10)]


def named(digits: Path, target: Path, names: list[str] | None) -> Path:
    """The digits with other names of their classes."""
    shutil.copytree(digits, target)
    meta = json.loads((target / "meta.json").read_text())
    (target / "meta.json").unlink()
    if names is not None:
        (target / "meta.json").write_text(json.dumps({**meta, "classes": names}))
    return target


@pytest.fixture
def small(vision: Path, digits: Path, tmp_path: Path) -> list[str]:
    data = named(digits, tmp_path / "data", NAMES)
    changes = ["train.max_steps=2", "task.mixup=0", "task.cutmix=0", f"data.root={data}", "eval.every_steps=2"]
    train(load_config(str(vision), changes), tmp_path / "run")
    return changes


def test_eval_compares_the_names(
    cli: Any, small: list[str], digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = cli("eval", "run", "--split", "val")
    assert same.returncode == 0, same.stderr
    moved = cli("eval", "run", f"data.root={named(digits, tmp_path / 'moved', NAMES)}", "--split", "val")
    assert moved.stdout == same.stdout
    for number, (names, said) in enumerate(
        (
            ([*NAMES[:8], NAMES[9], NAMES[8]], "class 8 is 'animal 9' instead of 'animal 8'; class 9 is 'animal 8'"),
            ([*NAMES[:9], "emu"], "class 9 is 'emu' instead of 'animal 9'"),
            (NAMES[::-1], "class 0 is 'animal 9' instead of 'animal 0'"),
        )
    ):
        other = named(digits, tmp_path / f"other{number}", names)
        refused = cli("eval", "run", f"data.root={other}", "--split", "val")
        assert refused.returncode == 2
        assert f"{other} has other classes than run: {said}" in refused.stderr
        assert not refused.stdout
    bare = named(digits, tmp_path / "bare", None)
    assert cli("eval", "run", f"data.root={bare}", "--split", "val").stdout == same.stdout


def test_a_resume_compares_the_names(vision: Path, small: list[str], digits: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    named(digits, tmp_path / "data", NAMES[::-1])
    (tmp_path / "run/result.json").unlink()
    with pytest.raises(UserError, match="the names or the order of the classes changed"):
        train(load_config(str(vision), small), tmp_path / "run")
    (tmp_path / "run/data.json").rename(tmp_path / "data.json")  # as in a run of version 0.1.0
    with pytest.raises(UserError, match=r"has other classes than .*run: class 0 is 'animal 9' instead of 'animal 0'"):
        train(load_config(str(vision), small), tmp_path / "run")
    (tmp_path / "data.json").rename(tmp_path / "run/data.json")
    shutil.rmtree(tmp_path / "data")
    named(digits, tmp_path / "data", NAMES)
    assert train(load_config(str(vision), small), tmp_path / "run").finished


def test_splits_have_the_same_classes(vision: Path, digits: Path, tmp_path: Path) -> None:
    named(digits, tmp_path / "a", NAMES)
    named(digits, tmp_path / "b", NAMES[::-1])
    config = load_config(str(vision), [f"data.root={tmp_path / 'a'}", "data.val=../b/val"])
    with pytest.raises(UserError, match=r"\.\./b/val differ from those of train: class 0 is 'animal 9'"):
        train(config, tmp_path / "run")


def test_a_run_without_names_says_that_it_cannot_compare(
    vision: Path, digits: Path, tmp_path: Path, cli: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bare = named(digits, tmp_path / "bare", None)
    train(load_config(str(vision), ["train.max_steps=1", f"data.root={bare}"]), tmp_path / "run")
    other = named(digits, tmp_path / "other", NAMES)
    with caplog.at_level(logging.WARNING, "mmtrain"):
        done = cli("eval", "run", f"data.root={other}", "--split", "val")
    assert done.returncode == 0
    assert "run has no class names" in done.stderr + caplog.text


@pytest.mark.parametrize(("classes", "said"), [(9, r"set model\.num_classes=10"), (5, r"The largest label is 9: set")])
def test_labels_without_a_class(vision: Path, digits: Path, tmp_path: Path, classes: int, said: str) -> None:
    bare = named(digits, tmp_path / "bare", None)
    config = load_config(str(vision), [f"data.root={bare}", f"model.num_classes={classes}"])
    with pytest.raises(UserError, match=rf"shard-\d+\.tar, sample '\d+': label \d, but model\.num_classes is .*{said}"):
        train(config, tmp_path / "run")
