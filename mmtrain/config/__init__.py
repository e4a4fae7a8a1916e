"""Configuration: the schema, the registries of models, tasks and data sources, YAML files and overrides.

This package defines each key with its default, bounds and description. The package that reads a key defines its effect.
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
