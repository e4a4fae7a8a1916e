"""Models. They know nothing of training."""

from mmtrain.models.pretrained import from_pretrained, save_pretrained
from mmtrain.models.registry import build_model, create_model, list_models

__all__ = ["build_model", "create_model", "from_pretrained", "list_models", "save_pretrained"]
