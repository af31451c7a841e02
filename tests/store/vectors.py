"""Small adapters to store: of every method, for one made-up backbone."""

from dataclasses import dataclass

import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.methods import Adapter, Backbone, ResidualSite

WIDTH, LAYERS = 8, 3
BACKBONE = Backbone(
    model_class="M",
    model_type="m",
    text_model_type="t",
    hidden_size=WIDTH,
    name="org/model",
    revision="r1",
    layers={index: (2, 4) for index in range(LAYERS)},
    fingerprint=(1.0, 2.0, 3.0),
)


@dataclass(frozen=True)
class PlainConfig:
    site: str = "mlp"


class PlainAdapter(Adapter):
    """One vector per layer and no scale. Not of the package: tests register it."""

    method = "plain"
    config_class = PlainConfig

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        for index in backbone.layers:
            self.layers[str(index)] = nn.ParameterDict({"vector": torch.randn(backbone.hidden_size)})

    @staticmethod
    def tensor_shapes(config, backbone):
        return {f"layers.{index}.vector": (backbone.hidden_size,) for index in backbone.layers}

    @property
    def residual_sites(self):
        return (ResidualSite(self.config.site, preserve_norm=False),)


MAKERS = {
    "mimic": lambda: mk.MimICAdapter(mk.MimICConfig(ffn_shift=True), BACKBONE),
    "m2iv": lambda: mk.M2IVAdapter(mk.M2IVConfig(), BACKBONE),
    "live": lambda: mk.LIVEAdapter(mk.LIVEConfig(), BACKBONE),
    "plain": lambda: PlainAdapter(PlainConfig(), BACKBONE),
}


def live(value=None, config=None, backbone=BACKBONE):
    """A LIVE adapter, every number of it ``value`` if that is given."""
    adapter = mk.LIVEAdapter(config or mk.LIVEConfig(), backbone)
    if value is not None:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(value)
    return adapter


def library_of_three(folder, **labels):
    """Entries a, b and c, of which the numbers are 1, 2 and 3, as are the tags: v1, v2 and v3."""
    library = mk.VLibrary(folder)
    for value, name in enumerate("abc", 1):
        library.put(name, live(float(value)), tags=[f"v{value}"], embedding=[1.0, value], **labels)
    return library


def assert_same(actual, expected):
    """The same class, config, backbone and bits."""
    assert type(actual) is type(expected)
    assert actual.config == expected.config and actual.backbone == expected.backbone
    mine, theirs = actual.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, x in theirs.items():
        assert mine[name].dtype == x.dtype and mine[name].shape == x.shape, name
        assert torch.equal(bits(mine[name]), bits(x)), name


def bits(x):
    return x.detach().flatten().clone().view(torch.uint8)
