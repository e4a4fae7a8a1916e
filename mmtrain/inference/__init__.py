"""Use of trained models: load a run or an export, classify images, forecast tables and panels, read and write weights.

All names in this module are public: ``from mmtrain.inference import load_trained``. ``mmtrain.export`` writes other
formats, such as ONNX.
"""

from mmtrain.inference.folder import save_pretrained
from mmtrain.inference.panels import forecast_panel
from mmtrain.inference.predict import classify, forecast
from mmtrain.inference.pretrained import from_pretrained
from mmtrain.inference.trained import TrainedModel, export, load_trained

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
