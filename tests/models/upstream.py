"""The published Mamba implementation (``mamba_ssm``, ``causal_conv1d``) as a reference on a machine without CUDA.

Its Python parts are pure PyTorch, yet importing the packages loads their CUDA extensions, Triton kernels and language
models. So here the packages are entered by their folders, without running their ``__init__``, and an extension that
is not there is replaced by an empty module while the reference functions are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

from torch import Tensor, nn

#: How to get the reference where there is no CUDA. Only Python files are installed; the build needs torch and wheel.
INSTALL = (
    "pip install wheel && MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
    "CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE "
    "pip install --target build/upstream --no-deps --no-build-isolation "
    "mamba-ssm==2.2.2 causal-conv1d==1.4.0 einops==0.8.2, then PYTHONPATH=build/upstream"
)
_PACKAGES = ("mamba_ssm", "causal_conv1d")
_EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")


@dataclass(frozen=True)
class Upstream:
    """What is compared with.

    ``block(dim, state, conv, expand)`` builds upstream's Mamba block, whose forward (B, L, dim) → (B, L, dim) runs its
    slow path on any device; ``scan`` is its ``selective_scan_ref`` and ``conv`` its ``causal_conv1d_ref``.
    """

    block: Callable[[int, int, int, int], nn.Module]
    scan: Callable[..., Tensor]
    conv: Callable[..., Tensor]


def _entered(package: str) -> ModuleType:
    """An empty module that finds the submodules of ``package``; the package's own ``__init__`` does not run."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not installed")
    module = ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    return module


def load() -> Upstream:
    """Import the reference and leave ``sys.modules`` as it was.

    Raises:
        ImportError: a package is not installed, or this version of it cannot be imported.
    """
    stubs: dict[str, ModuleType] = {package: _entered(package) for package in _PACKAGES}
    for extension in _EXTENSIONS:
        if importlib.util.find_spec(extension) is None:
            stubs[extension] = ModuleType(extension)
    with suppress(ImportError):  # before the patch, which would forget it again: Triton does not bear a second import
        importlib.import_module("triton")
    # patch.dict puts sys.modules back: no other test may meet an emptied package
    with mock.patch.dict(sys.modules, stubs):
        conv = importlib.import_module("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
        simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
    # the slow path calls these globals: the CUDA scan and convolution unless replaced
    vars(simple).update(selective_scan_fn=scan, causal_conv1d_fn=None)

    def block(dim: int, state: int, conv: int, expand: int) -> nn.Module:
        return simple.Mamba(dim, d_state=state, d_conv=conv, expand=expand, use_fast_path=False)

    return Upstream(block, scan, conv)
