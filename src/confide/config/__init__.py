"""What a run is asked to do: the experiment's sections and the one cascade that reads them."""

from confide.config.experiment import (
    CategoryFeature,
    ConsentConfig,
    DataConfig,
    Experiment,
    Feature,
    LabelConfig,
    ModelConfig,
    NumberFeature,
    PrivacyConfig,
    RunConfig,
    SchemaConfig,
    SealingConfig,
    SimulatedConsent,
    SitesConfig,
    TrainingConfig,
    Withdrawal,
)
from confide.config.load import load_experiment, parse_assignment, read_toml
from confide.config.partition import PartitionConfig
from confide.config.scenario import Churn, ScenarioConfig
from confide.config.section import Scalar
from confide.config.strategy import STRATEGY_OPTIONS, StrategyConfig

__all__ = [
    "STRATEGY_OPTIONS",
    "CategoryFeature",
    "Churn",
    "ConsentConfig",
    "DataConfig",
    "Experiment",
    "Feature",
    "LabelConfig",
    "ModelConfig",
    "NumberFeature",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "ScenarioConfig",
    "SchemaConfig",
    "SealingConfig",
    "SimulatedConsent",
    "SitesConfig",
    "StrategyConfig",
    "TrainingConfig",
    "Withdrawal",
    "load_experiment",
    "parse_assignment",
    "read_toml",
]
