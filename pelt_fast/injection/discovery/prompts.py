"""Whether a prompt can go in front of a decoder's tokens, asked of the decoder itself.

It can where the decoder takes embeddings in the place of ids, and its positions are relative: the
virtual tokens then have the first P, and the tokens follow. inject proves the rest on the finished
model (``prompt_proof``).
"""

import inspect

import torch
from torch import Tensor, nn

from pelt_fast.layouts.layout import PromptLayout, StackLayout
from pelt_fast.layouts.lookup import find

from ..prompt_proof import hidden_states
from ..rounding import is_off
from ..synthetic_batch import token_ids
from ..unchanged import unchanged

_TAKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def prompt_of(base: nn.Module, stack: StackLayout) -> tuple[PromptLayout | None, str]:
    """How a prompt is put in front of ``stack``, or None and why there is no place for one."""
    owner = find(base, stack.owner)
    why = _why_not_asked(base, owner, stack)
    if why:
        return None, why
    with unchanged(base, training=False), torch.no_grad():
        try:
            why = _why_not(owner, token_ids(base))
        except Exception as error:  # a model may raise anything on an input that it does not expect
            why = f"it does not run on embeddings and positions ({type(error).__name__}: {error})"
    return (None, why) if why else (PromptLayout(), "")


def _why_not_asked(base: nn.Module, owner: nn.Module, stack: StackLayout) -> str:
    kinds = {attention.kind for attention in stack.attentions}
    if stack.kind != "decoder" or "cross" in kinds:
        return "a place in front of tokens is looked for in a decoder alone that has no encoder"
    if getattr(base, "main_input_name", "input_ids") != "input_ids":
        return f"its input is {base.main_input_name}, not tokens"
    taken = inspect.signature(owner.forward).parameters
    lacking = [name for name in _TAKEN if name not in taken]
    return f"its forward takes no {', '.join(lacking)}" if lacking else ""


def _why_not(owner: nn.Module, ids: Tensor) -> str:
    """What embeddings, or other positions, change; "" where nothing."""
    embedded = owner.get_input_embeddings()(ids)
    first, count = hidden_states(owner(input_ids=ids, use_cache=False)), ids.shape[1]
    if is_off(first, hidden_states(owner(inputs_embeds=embedded, use_cache=False))):
        return "it computes something else on the embeddings of its tokens than on the tokens"
    owner(inputs_embeds=1.1 * embedded, use_cache=False)  # Gemma 4 takes those of tokens alone
    later = torch.arange(3, 3 + count, device=ids.device).expand_as(ids)
    moved = owner(input_ids=ids, position_ids=later, use_cache=False)
    if is_off(first, hidden_states(moved)):
        return "its positions are absolute, and virtual tokens have none"
    return ""
