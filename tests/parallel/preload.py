"""What every process of a gang needs, imported once by the server that they are forked from."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import mmtrain.inference
import mmtrain.tasks
import mmtrain.train.session  # noqa: F401
from mmtrain.torchvision_compat import ensure_torchvision

ensure_torchvision()
with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
