from mmicl_kernels.methods.prompt_tuning.adapter import PromptTuningAdapter
from mmicl_kernels.methods.prompt_tuning.config import PromptTuningConfig

__all__ = ["PromptTuningAdapter", "PromptTuningConfig"]
