"""The models, built by name or from their configuration.

Here belong the architectures (``vim2``, ``tsm2``), their parts (``mixers``, ``s6``, ``averaging``, ``stochastic``),
their initial weights and the recurrent mode of a causal mixer (``streaming``). Kernels belong in ``mmtrain.ops``.
Losses, optimizers and everything else that trains belong in ``mmtrain.tasks`` and ``mmtrain.train``.
"""

from mmtrain.models.registry import build_model, create_model, list_models

__all__ = ["build_model", "create_model", "list_models"]
