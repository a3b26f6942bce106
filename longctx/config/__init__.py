"""The typed border: every setting, its unit and its meaning. Values stand in `conf/`, not here."""

from longctx.config.data import ContextsConfig, DataConfig
from longctx.config.distill import KlConfig, TeacherConfig
from longctx.config.encoder import CepeConfig, EncoderConfig
from longctx.config.in_loop import InLoopConfig
from longctx.config.rope import RopeConfig
from longctx.config.run import (
    AdapterConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from longctx.config.typed import build, choice, positive

__all__ = [
    "AdapterConfig",
    "CepeConfig",
    "ContextsConfig",
    "DataConfig",
    "EncoderConfig",
    "InLoopConfig",
    "KlConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "WandbConfig",
    "build",
    "choice",
    "positive",
]
