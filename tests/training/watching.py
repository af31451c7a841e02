"""What PyTorch computes meanwhile: the largest results of a kind, and where the host waits for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Largest(TorchDispatchMode):
    """The largest number of elements among results of operators that ``of`` picks by their shape."""

    def __init__(self, of):
        super().__init__()
        self.of, self.most = of, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if torch.is_tensor(x) and self.of(tuple(x.shape)):
                self.most = max(self.most, x.numel())
        return result


class Waits(TorchDispatchMode):
    """The operators that would wait for a device, on the CPU too: of a value or of a shape."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = (
            tree_flatten(args)[0] if name in ("index", "index_put_", "index_put", "_index_put_impl_") else []
        )
        if name in self.NAMES or any(torch.is_tensor(x) and x.dtype == torch.bool for x in masks[1:]):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
