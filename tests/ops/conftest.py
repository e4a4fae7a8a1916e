from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scan_cases import available_isas

from mmtrain.ops import backend
from mmtrain.ops.cpu import library


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has."""
    if request.param not in available_isas():
        pytest.skip(f"this machine has no {request.param}")
    library.loaded().set_isa(request.param)
    yield request.param
    library.loaded().set_isa("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As at the start of a process: no library loaded, nothing told; put back afterwards."""
    monkeypatch.setattr(backend, "_logged", set())
    library.load.cache_clear()
    yield
    monkeypatch.undo()
    library.load.cache_clear()
