"""The C++ kernels for CPU tensors (``csrc``), compiled by ``build``, loaded by ``library``.

Each other module registers the torch operators of one kernel: it allocates outputs, passes addresses and strides, and
has the fake kernels and gradients. Checks of arguments and the choice of a backend belong in :mod:`mmtrain.ops`.
"""
