"""Use trained models: load a run or an export, classify images, forecast tables and panels, read and write weights.

Nothing here trains. Everything is public: ``from mmtrain.inference import load_trained``.
"""

from mmtrain.inference.panels import forecast_panel
from mmtrain.inference.pretrained import from_pretrained, save_pretrained
from mmtrain.inference.trained import TrainedModel, classify, export, forecast, load_trained

__all__ = [
    "TrainedModel",
    "classify",
    "export",
    "forecast",
    "forecast_panel",
    "from_pretrained",
    "load_trained",
    "save_pretrained",
]
