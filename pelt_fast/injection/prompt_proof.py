"""The proof of a prompt's place that was discovered: a prompt that is made of the embeddings of
tokens is those tokens.

The base reads a few tokens and the batch behind them. The model with the prompt reads the batch
alone, and must compute the same for it: without a mask, padded left, and in two parts with a cache.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pelt_fast.layouts.lookup import base_of
from pelt_fast.modules import Prompt

from .record import Site
from .rounding import relative_error, rounding
from .synthetic_batch import token_ids
from .unchanged import unchanged
from .zero_update import zero_update

IN_FRONT = 4  # the base reads so many tokens in front of a batch
SHARE = 0.02  # of an effect that may be wrong, beside rounding errors


def prove_prompt(model: nn.Module, sites: list[Site]) -> None:
    """ValueError where the prompt among ``sites``, if there is one, is not what its tokens are."""
    prompts = [site.module for site in sites if isinstance(site.module, Prompt)]
    if not prompts:
        return
    base = base_of(model)
    with contextlib.ExitStack() as guards:
        guards.enter_context(torch.no_grad())
        guards.enter_context(torch.compiler.set_stance("force_eager"))
        guards.enter_context(unchanged(model, training=False))
        guards.enter_context(zero_update(sites, training=False))
        try:
            why = _why_not_proved(base, prompts[0], token_ids(base))
        except Exception as error:  # a model may raise anything on an input that it does not expect
            why = f"it does not run behind one ({type(error).__name__}: {error})"
        if why:
            raise ValueError(
                f"no prompt can be put in front of the tokens of this {type(model).__name__}:"
                f" {why}. Choose a prefix, or give a layout= that names its place"
            )


def _why_not_proved(base: nn.Module, prompt: Prompt, ids: Tensor) -> str:
    """Why the prompt is not shown to be its tokens, or ""."""
    for when, wanted, others, found in _compared(base, prompt, ids):
        allowed = rounding(wanted.dtype)
        effects = [relative_error(wanted, other) for other in others]
        if effects[0] < 4 * allowed:
            return f"{when} its effect is not larger than rounding errors"
        effect = min(effect for effect in effects if effect >= 4 * allowed)
        error = relative_error(wanted, found)
        if error > allowed + SHARE * effect:
            return (
                f"{when} it does not act as tokens with its embeddings do (the error is"
                f" {error / effect:.2g} of the effect)"
            )
    return ""


def _compared(base: nn.Module, prompt: Prompt, ids: Tensor) -> Iterator[tuple]:
    """(when, what the base computes behind the tokens, what it would compute if something were left
    out, what the model computes behind the prompt). Left out are the tokens in front or the mask,
    and, second, the right positions. The prompt is empty when this begins, and afterwards what it
    was."""
    length, empty, front = IN_FRONT, prompt.embedding, ids[:1, :IN_FRONT]
    behind = torch.cat([front.expand(len(ids), -1), ids], 1)
    every = torch.ones_like(behind)
    seen = every.clone()
    seen[0, length : length + 2] = 0  # the first row is shorter by two tokens, padded left
    mask = seen[:, length:]
    rows, places = mask.bool(), torch.arange(behind.shape[1], device=ids.device)
    places = (places + length * (places >= length)).expand_as(behind)
    alone, wanted = _computed(base, input_ids=ids), _computed(base, input_ids=behind)[:, length:]
    padded = _computed(base, input_ids=behind, attention_mask=seen)[:, length:]
    moved = _computed(base, input_ids=behind, attention_mask=every, position_ids=places)
    others, parts = (alone, moved[:, length:]), _in_two_parts(base, behind)
    embedded = base.get_input_embeddings()(front)[0].to(empty.dtype)
    prompt.embedding = nn.Parameter(embedded, empty.requires_grad)
    try:
        yield "without a mask", wanted, others, _computed(base, input_ids=ids)
        found = _computed(base, input_ids=ids, attention_mask=mask)
        yield "in a padded batch", padded[rows], (wanted[rows],), found[rows]
        if parts is not None:
            yield "with a cache", parts[:, length:], others, _in_two_parts(base, ids)
    finally:
        prompt.embedding = empty


def _computed(base: nn.Module, **batch) -> Tensor:
    return hidden_states(base(**batch, use_cache=False))


def _in_two_parts(base: nn.Module, ids: Tensor) -> Tensor | None:
    """What is computed of all tokens but the last, and then of that; None where the model has no
    cache."""
    taken = inspect.signature(base.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in taken), None)
    first = None if name is None else base(input_ids=ids[:, :-1], use_cache=True)
    if first is None or first.get(name) is None:
        return None
    second = base(input_ids=ids[:, -1:], use_cache=True, **{name: first[name]})
    return torch.cat([hidden_states(first), hidden_states(second)], 1)


def hidden_states(output) -> Tensor:
    """What a model computes of each token (B, T, d): the first tensor of its output."""
    return output[0]
