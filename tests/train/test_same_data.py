"""A run goes on with the data that it was trained on, or is told to take what there is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmtrain.config import load_config
from mmtrain.errors import SharedError, UserError
from mmtrain.inference import forecast, load_trained
from mmtrain.runs import journal
from mmtrain.runs.folder import RunFolder
from mmtrain.train.checkpoint.store import MANIFEST, entries_of, write_manifest
from mmtrain.train.session import train

MODEL = ["model.lookback=24", "model.horizon=4", "model.patch_size=8", "model.dim=8", "model.depth=1", "threads=1"]


def table(rows: int = 200, **columns: Any) -> pd.DataFrame:
    number = np.arange(rows)
    dates = pd.date_range("2024-01-01", periods=rows, freq="h")
    return pd.DataFrame({"date": dates, "a": np.sin(number / 4), "b": np.cos(number / 5), **columns})


def start(here: Path, *keys: str) -> None:
    """The command that began the run, once more."""
    common = [f"data.path={here / 't.csv'}", "data.split=ratio", "train.max_steps=4", "train.batch_size=16"]
    train(load_config("tsm2_etth1", [*MODEL, *common, "tracking.plots=false", *keys]), here / "run")


def stopped(here: Path) -> None:
    """Make the finished run one that was stopped after its last step."""
    (here / "run" / "result.json").unlink()


def data_lines(here: Path) -> list[dict[str, Any]]:
    return [line for line in journal.read(here / "run") if line["kind"].startswith("data_")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("same_data")
    table().to_csv(here / "t.csv", index=False)
    start(here)
    stopped(here)
    return here


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A run that was stopped, and its table."""
    shutil.copytree(made, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    for config in (run / "config.yaml", *run.glob("checkpoints/step_*/config.yaml")):
        config.write_text(config.read_text().replace(str(made), str(tmp_path / "copy")))
    for folder in run.glob("checkpoints/step_*"):
        write_manifest(folder, entries_of(file for file in folder.iterdir() if file.name != MANIFEST))
    return tmp_path / "copy"


def as_earlier_versions_wrote(here: Path) -> None:
    """Without a fingerprint, in the run and in its checkpoints."""
    (here / "run" / "data.json").unlink()
    for folder in (here / "run" / "checkpoints").glob("step_*"):
        state = json.loads((folder / "state.json").read_text())
        del state["data"]
        (folder / "state.json").write_text(json.dumps(state))
        write_manifest(folder, entries_of(file for file in folder.iterdir() if file.name != MANIFEST))


def test_the_same_data_is_taken_without_a_word(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(here)
    assert (here / "run" / "result.json").is_file()
    assert data_lines(here) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and record.name == "mmtrain"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (table(b=3.0), "the values of the training rows changed"),
        (table().rename(columns={"b": "c"}), "columns: a, b before, a, c now"),
        (table(220), r"the run was trained on 113 samples, the data now has 127\n  training rows: 140 before, 154 now"),
    ],
)
@pytest.mark.parametrize("fallback", [False, True])
def test_other_data_is_refused(here: Path, changed: pd.DataFrame, told: str, fallback: bool) -> None:
    if fallback:  # nothing but the run folder says what the data was
        for folder in (here / "run" / "checkpoints").glob("step_*"):
            shutil.rmtree(folder)
        told = told.rpartition(r"\n  ")[2]
    changed.to_csv(here / "t.csv", index=False)
    before = {file: file.read_bytes() for file in (here / "run").rglob("*.json")}
    with pytest.raises(UserError, match=rf"run: the data differs from .*\n  {told}(.|\n)*data\.accept_changes=true"):
        start(here)
    assert {file: file.read_bytes() for file in (here / "run").rglob("*.json")} == before
    table().to_csv(here / "t.csv", index=False)
    start(here)


def test_a_table_that_was_moved_is_the_same(here: Path) -> None:
    (here / "t.csv").rename(here / "moved.csv")
    with pytest.raises(UserError, match=r"t\.csv: no such file"):
        start(here)
    start(here, f"data.path={here / 'moved.csv'}")
    assert data_lines(here) == []
    as_earlier_versions_wrote(here)
    stopped(here)
    with pytest.raises(UserError, match=r"another configuration:\n  data\.path"):
        start(here, f"data.path={here / 'moved.csv'}")


def test_changes_are_accepted_and_recorded(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(b=np.arange(200.0)).rename(columns={"b": "c"}).to_csv(here / "t.csv", index=False)
    start(here, "data.accept_changes=true")
    (line,) = data_lines(here)
    assert (line["kind"], line["step"]) == ("data_changed", 4)
    assert line["changes"] == ["columns: a, b before, a, c now", "the values of the training rows changed"]
    assert "continues with changed data (data.accept_changes=true): columns: a, b before" in caplog.text
    trained = load_trained(here / "run", "last")
    assert trained.assets["columns"] == ["a", "c"]
    assert trained.assets["scaler"]["mean"][1] == pytest.approx(np.arange(140).mean())
    assert forecast(trained, here / "t.csv").columns == ["a", "c"]
    recorded = RunFolder(here / "run").data()
    assert recorded is not None
    assert recorded["columns"] == ["a", "c"]
    stopped(here)
    start(here)  # the data of the run from now on, although its checkpoint is of the other
    assert len(data_lines(here)) == 1
    stopped(here)
    table().to_csv(here / "t.csv", index=False)  # and no more that of before
    with pytest.raises(UserError, match="columns: a, c before, a, b now"):
        start(here)


def test_another_number_of_samples_is_accepted(tmp_path: Path) -> None:
    """The run goes on at its place in the stream of samples, with the length of the new epoch."""
    table().to_csv(tmp_path / "t.csv", index=False)
    start(tmp_path, "eval.every_steps=2")
    stopped(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    table(260).to_csv(tmp_path / "t.csv", index=False)
    start(tmp_path, "eval.every_steps=2", "data.accept_changes=true")
    (line,) = data_lines(tmp_path)
    assert line["step"] == 2
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 4
    assert line["changes"][0] == "the run was trained on 113 samples, the data now has 155"


def test_a_run_of_an_earlier_version_gets_a_fingerprint(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_earlier_versions_wrote(here)
    start(here)
    assert [line["kind"] for line in data_lines(here)] == ["data_recorded"]
    assert caplog.text.count("stored no fingerprint of the data") == 1
    stopped(here)
    start(here)
    assert [line["kind"] for line in data_lines(here)] == ["data_recorded"]  # it is said once
    stopped(here)
    table(b=3.0).to_csv(here / "t.csv", index=False)
    with pytest.raises(UserError, match="the values of the training rows changed"):
        start(here)


def test_checkpoints_of_other_data_are_refused(here: Path) -> None:
    """As when they were copied into a run that began with other data."""
    table(b=3.0).to_csv(here / "t.csv", index=False)
    for name in ("data.json", "assets.json", "config.yaml"):
        (here / "run" / name).unlink()
    with pytest.raises(UserError, match="the values of the training rows changed"):
        start(here)


@pytest.mark.parametrize("content", ["", "[1]", '{"a"', "\xff"])
def test_a_damaged_fingerprint_is_named(here: Path, content: str) -> None:
    (here / "run" / "data.json").write_text(content, encoding="latin-1")
    for folder in (here / "run" / "checkpoints").glob("step_*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"data\.json is damaged: .*restore it, or delete it"):
        start(here)


def test_the_table_may_grow_behind_fixed_splits(tmp_path: Path) -> None:
    keys = ["data.split=date", "data.dates=[2024-01-06,2024-01-08]"]
    table().to_csv(tmp_path / "t.csv", index=False)
    start(tmp_path, *keys)
    stopped(tmp_path)
    table(260).to_csv(tmp_path / "t.csv", index=False)
    start(tmp_path, *keys)
    assert data_lines(tmp_path) == []


def test_every_rank_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is made of what each rank knows by itself; what rank 0 alone does is shared."""
    from mmtrain.train import state as same_data

    table(b=3.0).to_csv(here / "t.csv", index=False)
    full: Callable[..., None] = journal.record

    def record(run: Path, kind: str, **values: Any) -> None:
        if kind == "data_changed":
            raise UserError("the disk is full")
        full(run, kind, **values)

    monkeypatch.setattr(same_data.journal, "record", record)
    with pytest.raises(SharedError, match="the disk is full"):
        start(here, "data.accept_changes=true")
