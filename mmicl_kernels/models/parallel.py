"""Models that are spread over several processes."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard


def class_name(module: nn.Module) -> str:
    """The name of its class, which ``fully_shard`` replaces by one of its own."""
    return next(x.__name__ for x in type(module).__mro__ if not issubclass(x, FSDPModule))


def local_heads(
    parameters: list[Tensor], dim: int, H: int, num_heads: int, projection: nn.Module
) -> list[Tensor]:
    """Weight, bias and shift, whose heads are dimension ``dim``, of the H of ``num_heads`` heads that this
    process's attention has.

    With tensor parallelism an attention sees its share of the heads, in the order of ``projection``'s mesh.
    Each process computes the gradients of its own; they are gathered, so that all have those of all heads.

    Raises:
        NotImplementedError: nothing says whose heads these are.
    """
    if num_heads == H:
        return parameters
    weight = projection.weight
    if not isinstance(weight, DTensor):
        raise NotImplementedError(
            f"an attention sees {H} of its {num_heads} heads and its projection's weight is a "
            f"{type(weight).__name__}, expected a DTensor, as tensor parallelism of transformers makes it"
        )
    mesh = weight.device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    if H * mesh.size() != num_heads:
        raise NotImplementedError(
            f"an attention sees {H} of its {num_heads} heads, expected {num_heads} / {mesh.size()} as all "
            "processes of the mesh do"
        )
    first = H * mesh.get_local_rank()
    if not torch.is_grad_enabled():
        return [x.narrow(dim, first, H) for x in parameters]
    whole = [DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in parameters]
    return [x.redistribute(placements=[Shard(dim)]).to_local() for x in whole]
