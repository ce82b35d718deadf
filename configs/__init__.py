"""Settings of the project: models (schema.py), their values (YAML), how the two are joined (load.py), grids (grid.py).

The sections are the settings objects of the rooms; nothing here imports torch.
"""

from configs.cli import help_text, parse_cli
from configs.grid import Child, Sweep, load_sweep, parse_sweep
from configs.load import digest, load_config, read_config, save_config
from configs.paths import Paths
from configs.problems import ConfigError, Problem
from configs.schema import DataConfig, ModelConfig, SCRSection, TrackingConfig, TrainConfig, TrainerConfig, WorldConfig

__all__ = [
    "Child",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "Paths",
    "Problem",
    "SCRSection",
    "Sweep",
    "TrackingConfig",
    "TrainConfig",
    "TrainerConfig",
    "WorldConfig",
    "digest",
    "help_text",
    "load_config",
    "load_sweep",
    "parse_cli",
    "parse_sweep",
    "read_config",
    "save_config",
]
