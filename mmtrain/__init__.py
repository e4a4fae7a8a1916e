"""mmtrain: distributed training for MambaMixer models (ViM2 for vision, TSM2 for forecasting)."""

from mmtrain.version import __version__

__all__ = ["__version__"]
