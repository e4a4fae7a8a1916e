from __future__ import annotations

import pytest
import torch
import upstream as reference
from upstream import Upstream


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def upstream() -> Upstream:
    """The published Mamba implementation, or a skip that says how to get it."""
    try:
        return reference.load()
    except ImportError as error:
        pytest.skip(f"{error}; install the published implementation: {reference.INSTALL}")
