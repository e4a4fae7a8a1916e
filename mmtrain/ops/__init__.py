"""Scans, convolutions and what surrounds them behind one door: the same call whichever backend runs.

``selective_scan``, ``cross_selective_scan``, ``causal_conv1d`` and ``selective_mix`` choose between the C++ kernels for
CPUs (``cpu``) and plain PyTorch (``reference``, ``parallel``). ``MMTRAIN_SCAN=auto|reference|parallel|cpu`` or
``scan_backend(...)`` overrides the choice, and ``backend_report()`` tells it. See :mod:`mmtrain.ops.backend`.
"""

from mmtrain.ops.backend import backend_report, scan_backend
from mmtrain.ops.conv import causal_conv1d
from mmtrain.ops.cross import cross_selective_scan
from mmtrain.ops.dense import linear
from mmtrain.ops.dropout import keyed_dropout
from mmtrain.ops.mix import Direction, selective_mix
from mmtrain.ops.scan import selective_scan
from mmtrain.ops.weighted import weighted_sum

__all__ = [
    "Direction",
    "backend_report",
    "causal_conv1d",
    "cross_selective_scan",
    "keyed_dropout",
    "linear",
    "scan_backend",
    "selective_mix",
    "selective_scan",
    "weighted_sum",
]
