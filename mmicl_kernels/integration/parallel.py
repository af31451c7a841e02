"""Models that are spread over several processes."""

from torch import nn
from torch.distributed.tensor import DTensor


def tensor_parallel_rank(projection: nn.Module) -> int:
    """Which share of the heads this process has: its place in the mesh that ``projection`` is sharded over.

    Raises:
        NotImplementedError: its weight is no DTensor, so nothing says whose heads these are.
    """
    weight = projection.weight
    if not isinstance(weight, DTensor):
        raise NotImplementedError(
            f"an attention sees fewer heads than its projection has, whose weight is a "
            f"{type(weight).__name__}, expected a DTensor, as tensor parallelism of transformers makes it"
        )
    mesh = weight.device_mesh
    return mesh.get_local_rank("tp" if mesh.mesh_dim_names and "tp" in mesh.mesh_dim_names else None)
