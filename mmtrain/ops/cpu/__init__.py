"""The C++ kernels for CPU tensors. ``csrc`` contains the sources, ``build`` compiles and ``library`` loads them.

``operators`` registers the kernels as torch operators with fake kernels and gradients. It allocates outputs and passes
addresses and strides. The checks of arguments and the choice of the backend are in :mod:`mmtrain.ops`.
"""
