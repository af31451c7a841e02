"""What of ``shifted_attention``'s Triton kernels is launched, noted; and how it is launched, replaced."""

import inspect
from typing import NamedTuple

import pytest
import torch

from mmicl_kernels.ops.attention_shift._triton import bwd as shift_kernels
from mmicl_kernels.ops.attention_shift._triton import keys as keys_kernels
from mmicl_kernels.ops.shifted_attention._triton import bwd, fwd, launch

FORWARD, COMBINE = "shifted_attention_fwd_kernel", "shifted_attention_combine_kernel"
DQ, DKDV = "shifted_attention_dq_kernel", "shifted_attention_dkdv_kernel"
DELTA = ["attention_shift_bwd_kernel", "attention_shift_reduce_kernel"]
KEYS_DELTA = ["virtual_keys_bwd_kernel"]  # of several virtual keys, whose parameters' gradients are torch's


class Launch(NamedTuple):
    name: str
    programs: int
    arguments: dict


class Spy:
    """A kernel that also notes its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid):
        def launched(*args, **options):
            arguments = self.signature.bind(*args).arguments
            self.launches.append(Launch(self.kernel.__name__, grid[0], arguments))
            return self.kernel[grid](*args, **options)

        return launched


def note_launches(monkeypatch):
    """The list to which every launch is added from now on."""
    noted = []
    modules = (
        (fwd, (FORWARD, COMBINE)),
        (bwd, (DQ, DKDV)),
        (shift_kernels, DELTA),
        (keys_kernels, KEYS_DELTA),
    )
    for module, kernels in modules:
        for name in kernels:
            monkeypatch.setattr(module, name, Spy(getattr(module, name), noted))
    return noted


def names(launches):
    return [x.name for x in launches]


def use(monkeypatch, config):
    """Every kernel is launched by ``config``."""
    if config.TMA and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this device")
    monkeypatch.setattr(launch, "config", lambda *_: config)


def split(monkeypatch, parts, rows=launch.DECODE_ROWS):
    """Queries that have ``rows`` rows of a tile or fewer split their keys into ``parts``."""
    monkeypatch.setattr(launch, "DECODE_ROWS", rows)
    monkeypatch.setattr(launch, "splits", lambda *_: parts)
