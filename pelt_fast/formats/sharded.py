"""Parameters sharded by FSDP2 (``fully_shard`` after inject): gathered to read, sharded to write.

The processes communicate: each one must make these calls, in the same order.
"""

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages any of the model's parameters, gathered at the moment or not."""
    managed = any(hasattr(module, "reshard") for module in model.modules())
    return managed or any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values, detached; gathered if it is sharded."""
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def writes(model: nn.Module) -> bool:
    """Whether this process is the one that writes files."""
    return not is_sharded(model) or dist.get_rank() == 0


def resharded(model: nn.Module) -> nn.Module:
    """The model, with every parameter sharded again. A forward without a backward leaves some
    gathered, and values written into these are lost."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # an FSDPModule
            module.reshard()
    return model


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor, sharded in the same way as a parameter."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device, parameter.dtype)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
