"""Settings of the project: dataclasses (schema.py), their values (YAML), how the two are joined (load.py).

Grids of settings are sweep.py's. Only entry points import this package; every class behind them takes plain values.
Nothing here imports torch.
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
from configs.sweep import Child, Sweep, load_sweep, parse_sweep

__all__ = [
    "Child",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "HarvestConfig",
    "ModelConfig",
    "Paths",
    "PredictorSection",
    "Problem",
    "SCRSection",
    "Sweep",
    "TrackingConfig",
    "TrainConfig",
    "TrainerConfig",
    "WorldConfig",
    "fingerprint",
    "help_text",
    "load_config",
    "load_sweep",
    "parse_cli",
    "parse_sweep",
    "read_config",
    "save_config",
]
