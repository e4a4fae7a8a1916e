"""Configuration: the schema, the registries of its kinds, YAML files with includes and ``key=value`` overrides.

A key, its default, its bounds and its description belong here; what a key does belongs to the package that reads it.
"""

from mmtrain.config.data import (
    DATA,
    DataConfig,
    FFCVDataConfig,
    ImageDataConfig,
    PanelDataConfig,
    SeriesDataConfig,
    ShardsDataConfig,
    SyntheticDataConfig,
)
from mmtrain.config.load import config_names, load_config, to_yaml
from mmtrain.config.models import (
    MODELS,
    ForecasterConfig,
    ImageModelConfig,
    ModelConfig,
    TSM2Config,
    ViM2Config,
)
from mmtrain.config.schema import (
    STRATEGIES,
    TASKS,
    CheckpointConfig,
    ClassificationConfig,
    ClusterConfig,
    EvalConfig,
    ForecastingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from mmtrain.config.section import replace

__all__ = [
    "DATA",
    "MODELS",
    "STRATEGIES",
    "TASKS",
    "CheckpointConfig",
    "ClassificationConfig",
    "ClusterConfig",
    "DataConfig",
    "EvalConfig",
    "FFCVDataConfig",
    "ForecasterConfig",
    "ForecastingConfig",
    "ImageDataConfig",
    "ImageModelConfig",
    "ModelConfig",
    "OptimConfig",
    "PanelDataConfig",
    "ParallelConfig",
    "RunConfig",
    "SeriesDataConfig",
    "ShardsDataConfig",
    "SyntheticDataConfig",
    "TSM2Config",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "ViM2Config",
    "config_names",
    "load_config",
    "replace",
    "to_yaml",
]
