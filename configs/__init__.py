"""Settings of the project: dataclasses (schema.py), their values (YAML), how the two are joined (load.py).

Only entry points import this package; every class behind them takes plain values. Nothing here imports torch.
"""

from configs.load import ConfigError, fingerprint, help_text, load_config, parse_cli, read_config, save_config
from configs.schema import (
    DataConfig,
    EvaluationConfig,
    HarvestConfig,
    ModelConfig,
    Paths,
    PredictorSection,
    Problem,
    SCRSection,
    TrackingConfig,
    TrainConfig,
    TrainerConfig,
    WorldConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "HarvestConfig",
    "ModelConfig",
    "Paths",
    "PredictorSection",
    "Problem",
    "SCRSection",
    "TrackingConfig",
    "TrainConfig",
    "TrainerConfig",
    "WorldConfig",
    "fingerprint",
    "help_text",
    "load_config",
    "parse_cli",
    "read_config",
    "save_config",
]
