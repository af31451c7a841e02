"""Losses and a loop. The student and the teacher are one frozen model, shifted and not."""

from mmicl_kernels.data.batch import AggregationBatch
from mmicl_kernels.data.collate import AggregationCollator, DrawnEpisodes, EpisodeCollator, epochs
from mmicl_kernels.data.documents import Documents, document_batches
from mmicl_kernels.data.episodes import EpisodeBatch, ManyShotBatch, align, episode_batch
from mmicl_kernels.data.prefix import PrefixedBatch, prefixed_batch
from mmicl_kernels.data.sampling import Draw, draw_demonstrations, joint_features, split_shots
from mmicl_kernels.data.shots import NearestShots, RandomShots
from mmicl_kernels.methods import ADAPTERS
from mmicl_kernels.methods.objective import Losses, Objective, trainable
from mmicl_kernels.training.loop import TrainingConfig, train
from mmicl_kernels.training.module import TrainedModule

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


# Imported when they are asked for.
_LAZY = {
    "AIMObjective": "aim",
    "LIVEObjective": "live",
    "M2IVObjective": "m2iv",
    "MimICObjective": "mimic",
    "PromptTuningObjective": "prompt_tuning",
    "HiFICLObjective": "hificl",
    "STAVEObjective": "stave",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return ADAPTERS[_LAZY[name]].objective_class()
