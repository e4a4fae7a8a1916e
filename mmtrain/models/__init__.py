"""Models. They know nothing of training."""

from mmtrain.models.registry import build_model, create_model, list_models

__all__ = ["build_model", "create_model", "list_models"]
