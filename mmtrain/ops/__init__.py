"""The operators of the models: scans, convolutions, mixers, matrix products and dropout, for every device.

Each public function checks its arguments, selects an implementation with :mod:`mmtrain.ops.backend`, and calls it. The
C++ kernels for CPUs are in ``cpu``, the Triton kernels in ``triton``, the calls of mamba-ssm in ``upstream``, and the
plain PyTorch implementations in ``reference``. Modules with parameters are in :mod:`mmtrain.models`.
"""

from mmtrain.ops.backend import backend_report, scan_backend
from mmtrain.ops.conv import causal_conv1d
from mmtrain.ops.dense import linear
from mmtrain.ops.elementwise import keyed_dropout, weighted_sum
from mmtrain.ops.mix import Direction, selective_mix
from mmtrain.ops.scan import selective_scan

__all__ = [
    "Direction",
    "backend_report",
    "causal_conv1d",
    "keyed_dropout",
    "linear",
    "scan_backend",
    "selective_mix",
    "selective_scan",
    "weighted_sum",
]
