"""Losses and a loop. The student and the teacher are one frozen model, shifted and not."""

from mmicl_kernels.training.episodes import EpisodeBatch
from mmicl_kernels.training.loop import TrainingConfig, train
from mmicl_kernels.training.objectives import Losses, MimICObjective, trainable

__all__ = [
    "EpisodeBatch",
    "Losses",
    "MimICObjective",
    "TrainingConfig",
    "train",
    "trainable",
]
