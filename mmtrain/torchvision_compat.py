"""Make ``import torchvision`` work beside a PyTorch build that cannot load its compiled ops.

torchvision's wheel ships ``_C.so``; when that library cannot be loaded (a CUDA wheel beside a CPU-only PyTorch) the
import dies with ``operator torchvision::nms does not exist``, because Python code registers fake kernels for ops which
nobody has declared. Declaring the two schemas is enough for models, transforms and timm.
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
_keep_alive: list[Any] = []  # a torch.library.Library takes its schemas along when it is collected


@cache
def ensure_torchvision() -> None:
    """Call before any import of torchvision or timm. Does nothing where torchvision's own ops load; safe to repeat."""
    if "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return  # let the import itself say that torchvision is missing
    import torch

    # Load the compiled ops the way torchvision does, so that what is declared below is only what is really missing:
    # a schema that is declared twice is an error as well.
    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError) as error:
            logging.getLogger("mmtrain").debug("torchvision's compiled ops do not load here: %s", error)
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            declared.define(_SCHEMAS[name])
        _keep_alive.append(declared)
