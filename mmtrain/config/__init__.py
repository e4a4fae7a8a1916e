"""Configuration: typed schema, YAML files with includes, ``key=value`` overrides. Imports nothing of the package."""

from mmtrain.config.data import (
    DataConfig,
    FFCVDataConfig,
    PanelDataConfig,
    SeriesDataConfig,
    ShardsDataConfig,
    SyntheticDataConfig,
)
from mmtrain.config.load import config_names, from_yaml, load_config, to_yaml
from mmtrain.config.models import MODELS, ModelConfig, TSM2Config, ViM2Config
from mmtrain.config.schema import (
    STRATEGIES,
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

__all__ = [
    "MODELS",
    "STRATEGIES",
    "CheckpointConfig",
    "ClassificationConfig",
    "ClusterConfig",
    "DataConfig",
    "EvalConfig",
    "FFCVDataConfig",
    "ForecastingConfig",
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
    "from_yaml",
    "load_config",
    "to_yaml",
]
