"""The batch script that a configuration becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.cluster.job import describe
from mmtrain.config import load_config


def test_the_signal_and_the_margin_are_those_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = ["cluster.gpus_per_node=0", "cluster.nodes=2"]
    usual = describe(load_config("vim2_digits", job), str(tmp_path / "run"))
    assert "#SBATCH --signal=USR2@120" in usual
    other = describe(
        load_config("vim2_digits", [*job, "cluster.signal=TERM", "cluster.margin=300"]), str(tmp_path / "run")
    )
    assert "#SBATCH --signal=TERM@300" in other
    assert "--margin 300" in other
    assert list(tmp_path.iterdir()) == []
