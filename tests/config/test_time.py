"""YAML takes 24:00:00 for a number in base 60, and Slurm takes that number for minutes: neither must happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config import load_config
from mmtrain.errors import UserError


@pytest.mark.parametrize("text", ["1:00", "24:00:00", "2-12:00:00", "90"])
def test_a_time_on_the_command_line_is_kept_as_it_is(text: str) -> None:
    assert load_config("vim2_digits", [f"cluster.time={text}"]).cluster.time == text


def test_a_time_without_quotes_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("include: []\ncluster: {time: 24:00:00}\n")
    with pytest.raises(UserError, match="in quotes"):
        load_config(path)
