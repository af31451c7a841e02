"""Losses and a loop. The student and the teacher are one frozen model, shifted and not."""

from mmicl_kernels.training.aggregation import AggregationBatch, AIMObjective
from mmicl_kernels.training.distillation import LIVEObjective, M2IVObjective
from mmicl_kernels.training.documents import Documents, document_batches
from mmicl_kernels.training.episodes import EpisodeBatch, ManyShotBatch
from mmicl_kernels.training.loop import TrainingConfig, train
from mmicl_kernels.training.module import TrainedModule
from mmicl_kernels.training.objectives import Losses, MimICObjective, Objective, trainable
from mmicl_kernels.training.sampling import Draw, draw_demonstrations, joint_features, split_shots

__all__ = [
    "AIMObjective",
    "AggregationBatch",
    "Documents",
    "Draw",
    "EpisodeBatch",
    "LIVEObjective",
    "Losses",
    "M2IVObjective",
    "ManyShotBatch",
    "MimICObjective",
    "Objective",
    "TrainedModule",
    "TrainingConfig",
    "document_batches",
    "draw_demonstrations",
    "joint_features",
    "split_shots",
    "train",
    "trainable",
]
