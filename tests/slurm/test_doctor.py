"""``mmtrain doctor --ranks`` names what keeps nodes from working together."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mmtrain.errors import SharedError
from mmtrain.parallel.preflight import check_ranks
from mmtrain.parallel.ranks import Ranks
from tests.slurm.cluster import Cluster


@pytest.mark.slow
def test_doctor_looks_at_all_tasks_of_a_step(cluster: Cluster, tmp_path: Path) -> None:
    command = ["srun", "-N3", "--ntasks-per-node=1", sys.executable, "-m", "mmtrain", "doctor", "--ranks"]
    told = cluster.ask(*command, "--run-dir", str(tmp_path))
    assert "3 ranks (CPU) on 3 nodes: node1, node2, node3" in told
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run([*command, "--run-dir", "/proc"], env=cluster.environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


class _Two(Ranks):
    """Two ranks of which the other one says what ``other`` makes of ours."""

    def gather(self, value):  # type: ignore[no-untyped-def]
        return [value, other(value)]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2


def plain(value: object) -> object:
    return {**value, "host": "far"} if isinstance(value, dict) else value


other = plain


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda value: value + 60 if isinstance(value, float) else plain(value), "far, .* has a clock|has a clock"),
        (lambda value: False if isinstance(value, bool) else plain(value), "far does not see a file that rank 0"),
        (lambda value: {"host": "far", "cuda": True} if isinstance(value, dict) else value, "has no visible GPU"),
        (plain, None),
    ],
)
def test_the_node_at_fault_is_named(tmp_path: Path, fault, said: str | None) -> None:  # type: ignore[no-untyped-def]
    ranks = _Two(0, 2, torch.device("cpu"))
    with patch(f"{__name__}.other", fault), patch.object(time, "sleep"):
        if said is None:
            assert check_ranks(ranks, tmp_path, "auto").startswith("2 ranks (CPU) on 2 nodes")
            return
        with pytest.raises(SharedError, match=said):
            check_ranks(ranks, tmp_path, "auto")
