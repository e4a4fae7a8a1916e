"""mmtrain: distributed training for MambaMixer models (ViM2 for vision, TSM2 for forecasting)."""

from mmtrain import _timm_hook

__version__ = "0.1.0"

_timm_hook.install()
