"""Examples to prompts: by a template, a chat template or the format of official code."""

from mmicl_kernels.data.prompts.builder import PromptBuilder

__all__ = ["PromptBuilder"]
