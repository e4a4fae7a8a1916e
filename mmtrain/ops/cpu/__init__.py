"""The C++ kernels for CPU tensors: compiled and loaded by ``build`` and ``library``, registered as torch operators."""
