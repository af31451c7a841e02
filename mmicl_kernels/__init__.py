"""Fast kernels for multimodal in-context learning without the demonstrations."""

import importlib

__version__ = "0.1.0"

# Public name -> module that has it. Imported at first use: importing the package loads nothing else.
_LAZY = {
    "ops": "mmicl_kernels.ops",
    "create": "mmicl_kernels.patch",
    "attach": "mmicl_kernels.patch",
    "detach": "mmicl_kernels.patch",
    "handle_of": "mmicl_kernels.patch",
    "load": "mmicl_kernels.patch",
    "load_model": "mmicl_kernels.models.pretrained",
    "load_official": "mmicl_kernels.patch",
    "load_processor": "mmicl_kernels.models.pretrained",
    "Handle": "mmicl_kernels.patch",
    "AdaptedModel": "mmicl_kernels.patch",
    "PromptBuilder": "mmicl_kernels.data.prompts",
    "UnsupportedModelError": "mmicl_kernels.models.anchors",
    "save_official": "mmicl_kernels.methods.official",
    "VLibrary": "mmicl_kernels.store",
    "MimICConfig": "mmicl_kernels.methods",
    "MimICAdapter": "mmicl_kernels.methods",
    "CheckpointError": "mmicl_kernels.methods",
    "AttentionShift": "mmicl_kernels.modules",
    "ResidualShift": "mmicl_kernels.modules",
    "ShiftedAttention": "mmicl_kernels.modules",
    "TokenFuser": "mmicl_kernels.modules",
    "M2IVConfig": "mmicl_kernels.methods",
    "M2IVAdapter": "mmicl_kernels.methods",
    "LIVEConfig": "mmicl_kernels.methods",
    "LIVEAdapter": "mmicl_kernels.methods",
    "AIMConfig": "mmicl_kernels.methods",
    "AIMAdapter": "mmicl_kernels.methods",
    "HiFICLConfig": "mmicl_kernels.methods",
    "HiFICLAdapter": "mmicl_kernels.methods",
    "STAVEConfig": "mmicl_kernels.methods",
    "STAVEAdapter": "mmicl_kernels.methods",
    "PromptTuningConfig": "mmicl_kernels.methods",
    "PromptTuningAdapter": "mmicl_kernels.methods",
    "train": "mmicl_kernels.training.run",
    "Recipe": "mmicl_kernels.training.recipes",
    "Demonstration": "mmicl_kernels.data",
    "Records": "mmicl_kernels.data",
    "DemonstrationBank": "mmicl_kernels.store",
    "evaluate": "mmicl_kernels.evaluation.run",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        message = f"mmicl_kernels.{name} needs transformers: pip install 'mmicl-kernels[hf]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
