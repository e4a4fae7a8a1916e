"""One cluster for all tests here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster

_NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs have time limits and grace periods to keep, so nothing else runs beside them."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timed)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"no Slurm here ({', '.join(missing)}): apt-get install slurmctld slurmd slurm-client munge, as root"
        )
    if os.geteuid() != 0:
        pytest.skip("slurm/cluster.sh starts nodes with host names of their own, for which it needs root")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    made.up()
    yield made
    made.down()


@pytest.fixture(autouse=True)
def _free_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test leaves behind does not keep the next one from its nodes."""
    yield
    if "cluster" in request.fixturenames:
        made: Cluster = request.getfixturevalue("cluster")
        made.free()
