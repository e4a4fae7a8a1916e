"""YAML 1.1 reads 24:00:00 as a number in base 60, which Slurm would read as minutes: a time stays text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("text", ["1:00", "24:00:00", "2-12:00:00", "90"])
def test_a_time_on_the_command_line_is_kept_as_it_is(text: str) -> None:
    assert load_config("vim2_digits", [f"cluster.time={text}"]).cluster.time == text


def test_a_time_without_quotes_in_a_file_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"include: {ROOT}/configs/vim2_digits.yaml\ncluster: {{time: 24:00:00}}\n")
    assert load_config(path).cluster.time == "24:00:00"
