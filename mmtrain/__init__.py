"""mmtrain: distributed training for MambaMixer models (ViM2 for vision, TSM2 for forecasting)."""

__version__ = "0.1.0"
