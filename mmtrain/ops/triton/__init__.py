"""Triton kernels of the selective scan, the directional scan and the causal convolution, for CUDA tensors.

This module imports nothing, so that ``import mmtrain.ops`` does not require Triton. The public functions are in
:mod:`mmtrain.ops.triton.api`. The docstrings of ``scan_kernels`` and ``scan_backward_kernels`` explain the design.
"""
