"""A digest of tensors: it says whether two files were written by one save."""

import hashlib

import torch
from torch import Tensor


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # of a copy: numpy makes a storage that cannot be resized, and FSDP2 frees it by resizing
        sha.update(memoryview(tensor.reshape(-1).view(torch.uint8).clone().numpy()))
    return sha.hexdigest()
