"""Triton kernels of the selective scan, the directional scan and the causal convolution, for CUDA tensors.

Nothing is imported here, so that ``import mmtrain.ops`` does not need Triton: see :mod:`mmtrain.ops.triton.api` for
what the dispatcher calls, and the heads of ``scan_forward.py`` and ``scan_backward.py`` for the design.
"""
