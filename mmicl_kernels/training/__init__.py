"""Losses and a loop. The student and the teacher are one frozen model, shifted and not."""

from mmicl_kernels.training.aggregation import AggregationBatch, AIMObjective
from mmicl_kernels.training.alignment import align, episode_batch
from mmicl_kernels.training.collate import AggregationCollator, DrawnEpisodes, EpisodeCollator, epochs
from mmicl_kernels.training.distillation import LIVEObjective, M2IVObjective
from mmicl_kernels.training.documents import Documents, document_batches
from mmicl_kernels.training.episodes import EpisodeBatch, ManyShotBatch
from mmicl_kernels.training.loop import TrainingConfig, train
from mmicl_kernels.training.module import TrainedModule
from mmicl_kernels.training.objectives import Losses, MimICObjective, Objective, trainable
from mmicl_kernels.training.prefix import PrefixedBatch, prefixed_batch
from mmicl_kernels.training.sampling import Draw, draw_demonstrations, joint_features, split_shots
from mmicl_kernels.training.shots import NearestShots, RandomShots

__all__ = [
    "AIMObjective",
    "AggregationBatch",
    "AggregationCollator",
    "Documents",
    "Draw",
    "DrawnEpisodes",
    "EpisodeBatch",
    "EpisodeCollator",
    "LIVEObjective",
    "Losses",
    "M2IVObjective",
    "ManyShotBatch",
    "MimICObjective",
    "NearestShots",
    "Objective",
    "PrefixedBatch",
    "RandomShots",
    "TrainedModule",
    "TrainingConfig",
    "align",
    "document_batches",
    "draw_demonstrations",
    "episode_batch",
    "epochs",
    "joint_features",
    "prefixed_batch",
    "split_shots",
    "train",
    "trainable",
]
