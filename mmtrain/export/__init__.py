"""A model as one file that runs without mmtrain: a torch.export program (.pt2) or an ONNX graph (.onnx).

Both are traced with the ``parallel`` scan backend, so that they are made of standard operators alone, and both are run
and compared with the model before they get their name. ``mmtrain.inference.export`` writes the weights themselves.
"""

from mmtrain.export.artifact import Exported
from mmtrain.export.onnx_graph import export_onnx
from mmtrain.export.program import export_torch
from mmtrain.export.trained import FORMATS, export_trained

__all__ = ["FORMATS", "Exported", "export_onnx", "export_torch", "export_trained"]
