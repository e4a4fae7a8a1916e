"""Make ``import torchvision`` work with a PyTorch build that cannot load torchvision's compiled operators.

torchvision's wheel contains a library ``_C.so``. If it cannot be loaded (a CUDA wheel with a CPU-only PyTorch), the
import fails with ``operator torchvision::nms does not exist``, because torchvision registers fake kernels for operators
that were not declared. Declaring two operators is enough for models, transforms and timm.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_keep_alive: list[Any] = []  # a torch.library.Library removes its operators when it is garbage-collected


@cache
def ensure_torchvision() -> None:
    """Declare torchvision's missing operators. Call this before importing torchvision or timm; calls may repeat.

    It does nothing if torchvision's compiled operators can be loaded.
    """
    if "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return  # the import of torchvision then reports that it is missing
    import torch

    # Load the compiled operators as torchvision does, and declare only those that are then missing: declaring an
    # operator twice is an error.
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError) as error:
            logging.getLogger("mmtrain").debug("torchvision's compiled operators cannot be loaded: %s", error)
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            declared.define(_SCHEMAS[name])
        _keep_alive.append(declared)
