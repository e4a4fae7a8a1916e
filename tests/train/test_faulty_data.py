"""A run over data of which some cannot be used: it ends, counts them, and its report lists them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmtrain.config import load_config
from mmtrain.data.images.tar_index import index_shard
from mmtrain.errors import UserError
from mmtrain.report import write_report
from mmtrain.train.session import train


@pytest.fixture
def damaged(vision: Path, digits: Path, tmp_path: Path) -> list[str]:
    """Overrides for a copy of the digits with two training images spoilt, and one of the test split."""
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    for split, places in (("train", (3, 40)), ("test", (5,))):
        path = sorted((copy / split).glob("*.tar"))[0]
        index, content = index_shard(path), bytearray(path.read_bytes())
        for place in places:
            content[index.offsets[place] : index.offsets[place] + 16] = bytes(16)
        path.write_bytes(bytes(content))
    return [f"data.root={copy}", "train.max_steps=null", "train.epochs=1", "data.workers=1"]


@pytest.mark.slow
def test_the_first_fault_stops_a_run(vision: Path, damaged: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample '.*': the image cannot be decoded.*data\.faults=skip"):
        train(load_config(str(vision), damaged), tmp_path / "run")


@pytest.mark.slow
def test_faults_are_left_out_and_listed_in_the_report(vision: Path, damaged: list[str], tmp_path: Path) -> None:
    config = load_config(str(vision), [*damaged, "data.faults=skip", "data.max_faults=0.005"])
    outcome = train(config, tmp_path / "run")
    assert outcome.finished
    assert outcome.test is not None
    assert outcome.test["samples"] == 358  # of 359
    lines = [
        json.loads(line) for line in (tmp_path / "run/faults/data_faults_rank_00000.jsonl").read_text().splitlines()
    ]
    assert sorted((line["split"], line["index"]) for line in lines) == [("test", 5), ("train", 3), ("train", 40)]
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "Faults in the data" in page
    assert "cannot be decoded" in page


@pytest.mark.slow
def test_too_many_faults_stop_a_run(vision: Path, damaged: list[str], tmp_path: Path) -> None:
    config = load_config(str(vision), [*damaged, "data.faults=skip", "data.max_faults=0.001"])
    with pytest.raises(UserError, match=r"2 of 1259 samples of the train split cannot be used.*data\.max_faults"):
        train(config, tmp_path / "run")
