"""A digest of tensors: it tells whether two files are of one save."""

import hashlib

import torch
from torch import Tensor


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # of a copy: numpy fixes the size of a storage, which FSDP2 frees by its size
        found.update(memoryview(tensor.reshape(-1).view(torch.uint8).clone().numpy()))
    return found.hexdigest()
