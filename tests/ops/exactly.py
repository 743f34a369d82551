"""What the C++ ops are judged by: fp64, in units of the result's own rounding and of fp32 sums."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(found: Tensor, wanted: Tensor, terms: int) -> None:
    """Within the result's rounding and that of a sum of ``terms`` fp32 products, in norm."""
    assert found.shape == wanted.shape
    budget = torch.finfo(found.dtype).eps + 4e-8 * terms**0.5
    error = (found.double() - wanted).norm()
    assert error <= budget * wanted.norm().clamp_min(1e-30), (error / wanted.norm()).item()


def padded(*shape: int, dtype: torch.dtype) -> Tensor:
    """A matrix whose rows lie further apart than they are long."""
    return torch.randn(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]]


def prefix_reference(q, o, lse, k, v, scale, relu, gated):
    """o and lse in fp64, differentiable in q, k, v and through what they are merged with."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[0], 0) for t in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if relu:
        return o + scores.clamp_min(0) @ v, lse
    own = torch.logsumexp(scores, -1)
    if not gated:
        return o + torch.exp(scores - own.unsqueeze(-1)) @ v, lse
    joint = torch.logaddexp(lse, own)
    weights = torch.exp(scores - joint.unsqueeze(-1))
    return o * torch.exp(lse - joint).unsqueeze(-1) + weights @ v, joint
