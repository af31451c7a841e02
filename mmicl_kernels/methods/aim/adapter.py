"""The parameters of AIM: one projection from last hidden states to input embeddings."""

import hashlib
import json
from dataclasses import asdict, replace

import torch

from mmicl_kernels.methods.aim.config import AIMConfig
from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone
from mmicl_kernels.methods.modules import TokenFuser


class AIMAdapter(Adapter):
    """``fuser.weight [C, C]``, ``fuser.bias [C]``, and the LayerNorm's two ``[C]`` if the config has one.

    A demonstration's last hidden states, after the final norm, at its text positions become as many fused
    tokens, which stand for it before the query: ``C_i = P(H_i^txt)``. Of one width-4096 model 16,781,312
    parameters. It has none in any decoder layer, so ``layers`` is empty.
    """

    method = "aim"
    config_class = AIMConfig

    def __init__(self, config: AIMConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.fuser = TokenFuser(backbone.hidden_size, config.layer_norm, dtype=DTYPE)

    @staticmethod
    def tensor_shapes(config: AIMConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        C = backbone.hidden_size
        shapes = {"fuser.weight": (C, C), "fuser.bias": (C,)}
        if config.layer_norm:
            shapes |= {"fuser.norm_weight": (C,), "fuser.norm_bias": (C,)}
        return shapes

    def digest(self) -> str:
        """Hexadecimal SHA-256 of what decides a demonstration's fused tokens: backbone, config, parameters.

        Synchronises with the device.
        """
        # Not what the backbone is called: the same weights live in many places.
        backbone = asdict(replace(self.backbone, name="", revision=""))
        described = json.dumps([backbone, asdict(self.config)], sort_keys=True)
        digest = hashlib.sha256(described.encode())
        for name, parameter in sorted(self.state_dict().items()):
            parameter = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            digest.update(parameter.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
