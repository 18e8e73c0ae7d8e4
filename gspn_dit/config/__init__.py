"""The configuration of a run: typed, frozen dataclasses, read from YAML and overridden on the command line."""

from gspn_dit.config.classification import ClassificationConfig
from gspn_dit.config.parsing import (
    config_from_dict,
    flatten,
    load_config,
    parse_train_arguments,
    read_yaml,
    save_config,
)
from gspn_dit.config.schema import (
    SCAN_DIRECTIONS,
    Config,
    DataConfig,
    LatentConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainArguments,
)
from gspn_dit.config.text import TextConfig, UNetConfig
from gspn_dit.config.training import TRACKERS, SamplingConfig, TrainingConfig

__all__ = [
    "SCAN_DIRECTIONS",
    "TRACKERS",
    "ClassificationConfig",
    "Config",
    "DataConfig",
    "LatentConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "SamplingConfig",
    "TextConfig",
    "TrainArguments",
    "TrainingConfig",
    "UNetConfig",
    "config_from_dict",
    "flatten",
    "load_config",
    "parse_train_arguments",
    "read_yaml",
    "save_config",
]
