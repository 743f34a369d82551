"""Positions under PEFT's prefix and prompt, which shift the positions of the tokens.

Rotary positions are relative. So a prefix is the same function if its keys are rotated by its
length, and a prompt needs no change. With learned positions PEFT trains another function than the
paper's: it is refused.
"""

import torch
from torch import Tensor, nn

from pelt_fast.layouts.lookup import base_of, stacks_of
from pelt_fast.modules import PrefixBank


def one_rotary(model: nn.Module, banks: list[PrefixBank]) -> list[PrefixBank]:
    """The banks, if they are one prefix of a decoder with rotary positions; else ValueError."""
    stacks = stacks_of(model)
    rotary = getattr(base_of(model), "rotary_emb", None)
    one = len(banks) == len(stacks) == 1 and stacks[0].kind == "decoder"
    if not one or rotary is None or _angles(model, 1)[0].shape[-1] != banks[0].shape[-1]:
        raise ValueError(
            f"PEFT's prefix on {type(model).__name__} is another function than the paper's: it"
            " moves the tokens' positions, and only whole rotary ones, of a decoder alone, are"
            " relative"
        )
    if getattr(base_of(model).config, "sliding_window", None):
        raise ValueError(
            f"PEFT's prefix on {type(model).__name__} falls out of a window of"
            f" {base_of(model).config.sliding_window} tokens, the paper's is seen by every one"
        )
    return banks


def check_prompt(model: nn.Module) -> None:
    """ValueError for a model whose prompt in PEFT shifts positions that are not relative."""
    first = stacks_of(model)[0]
    layout = first.prompt
    if layout is None or layout.norm or layout.layer or layout.positions or layout.strip:
        raise ValueError(
            f"PEFT's prompt on {type(model).__name__} takes learned positions, or others'; the"
            " paper's takes none: they are two functions"
        )


def _angles(model: nn.Module, position: int) -> tuple[Tensor, Tensor]:
    """cos and sin (1, D) of the rotation at ``position``, without the model's scaling."""
    base = base_of(model)
    like = base.get_input_embeddings().weight
    where = torch.tensor([[abs(position)]], device=like.device)
    cos, sin = (t[0].float() for t in base.rotary_emb(like[:1].float()[None], where))
    length = (cos**2 + sin**2).sqrt()
    return cos / length, sin / length * (1 if position >= 0 else -1)


def rotated(model: nn.Module, keys: Tensor, position: int) -> Tensor:
    """Keys (.., P, D), each rotated as the model rotates those at ``position``."""
    cos, sin = _angles(model, position)
    half = keys.shape[-1] // 2
    swapped = torch.cat([-keys[..., half:], keys[..., :half]], -1)
    return (keys.float() * cos + swapped.float() * sin).to(keys.dtype)
