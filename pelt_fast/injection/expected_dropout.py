"""Training mode without chance: each dropout multiplies by about 1 - p instead of drawing a mask.

A dropout that is missing, or is applied at another place, then changes the result.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)
_DRAWS = (torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.Tensor.uniform_,
          torch.Tensor.normal_)  # fmt: skip
_COINS = (torch.bernoulli, torch.Tensor.bernoulli)


class ExpectedDropout(TorchFunctionMode):
    """Replaces each random draw by a fixed value: a dropout by a factor of about 1 - p, a uniform
    or normal number by a half, a Bernoulli draw by its probability."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return _dropped(*args, **kwargs)
        if function in _DRAWS:
            return function(*args, **kwargs).fill_(0.5)
        if function in _COINS:
            return args[0].clone()
        if function is F.scaled_dot_product_attention:
            return _attended(*args, **kwargs)
        return function(*args, **kwargs)


def _dropped(input, p=0.5, training=True, inplace=False, train=None):
    """``input`` times 1 - p, slightly varied by channel, so that two dropouts in a row differ from
    one dropout with another p."""
    if not (training if train is None else train):
        return input
    channel = torch.arange(input.shape[-1], device=input.device, dtype=torch.float64)
    keep = (1 - p * (1 + 0.5 * torch.cos(channel))).to(input.dtype)
    return input.mul_(keep) if inplace else input * keep


def _attended(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, *args, **kwargs)
    return out * (1 - dropout_p)
