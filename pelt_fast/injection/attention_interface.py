"""How a prefix is put into a model's attentions: through transformers' AttentionInterface.

For each attention that can carry a prefix (sdpa, eager), a function named ``pelt_fast_<choice>`` is
registered, and the matching mask function. An attention module with a
:class:`~pelt_fast.modules.PrefixSlice` or :class:`~pelt_fast.modules.QuerySlice` runs
``prefix_attention`` (docs/maths.md#i4); any other runs the attention that the user chose. The
prefix is in no cache, so that any cache and any decoding work. It has no positions, and the
positions of the tokens do not change.

The mask function of sdpa gives what the kernels add to the scores, once for all layers. Otherwise
each layer would make it from a bool mask, forward and backward.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pelt_fast import functional
from pelt_fast.modules import PrefixSlice, QuerySlice
from pelt_fast.modules.generation import generation, keep_step, next_step
from pelt_fast.modules.routed_slice import RoutedSlice
from pelt_fast.ops.common.backends import backend
from pelt_fast.ops.common.bundles import QKV, Form, Prefix, Scores
from pelt_fast.ops.common.heads import (
    MASK_ALIGNMENT,
    additive_mask,
    aligned,
    context_scores,
    expand_heads,
)
from pelt_fast.ops.prefix_attention.op import attention_with_prefix, prefix_step

from .attention_keywords import KNOWN, check_given, check_known
from .record import Injection
from .routed_attention import attend_together

SLICE = "pelt_prefix_slice"  # attribute of an attention module that carries a prefix
WRAPPED = ("sdpa", "eager")
_NAME = "pelt_fast_{}"
_prefix_attention = functional.prefix_attention  # the package's own function


def wrapping(choice: str | None) -> str:
    """The registered name that wraps the user's attention; ValueError when it cannot be wrapped."""
    choice = choice or "eager"
    for known in WRAPPED:
        if choice in (known, _NAME.format(known)):
            return _NAME.format(known)
    raise ValueError(
        f"attention implementation {choice!r} cannot carry a prefix: pelt_fast needs its"
        " log-sum-exp, which transformers' wrapper does not pass on. Choose"
        " model.set_attn_implementation('sdpa') or 'eager' before inject"
    )


def check(module: nn.Module) -> None:
    """ValueError with the reason where an attention module cannot carry a prefix."""
    name = type(module).__name__
    if not _asks_the_interface(module):
        raise ValueError(
            f"{name} of this transformers computes its attention itself, so that a prefix would be"
            " ignored: put a method without one on it"
        )
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"{name} caps its scores (attn_logit_softcapping={softcap}): a prefix needs the"
            " log-sum-exp of capped scores, which no kernel gives. A config with None there, or a"
            " method without a prefix, works"
        )
    check_known(module)
    wrapping(module.config._attn_implementation)


def wrap(module: nn.Module, injection: Injection) -> None:
    """Choose the wrapping function on the config of an attention module. That config already
    belongs to this model alone (``own_configs``)."""
    choice = wrapping(module.config._attn_implementation)
    if module.config._attn_implementation != choice:
        module.config._attn_implementation = choice


def _asks_the_interface(module: nn.Module) -> bool:
    """Whether an attention gets its function from the interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is None or "ALL_ATTENTION_FUNCTIONS" in code.co_names


def still_wrapped(stack: nn.Module, *_) -> None:
    """Forward pre-hook of a stack with a prefix: RuntimeError when another attention was chosen
    after inject, which would ignore the prefix."""
    choice = _config_of(stack)._attn_implementation
    if choice not in map(_NAME.format, WRAPPED):
        raise RuntimeError(
            f"this model carries a prefix, but its attention is {choice!r} now, which ignores it:"
            " eject, choose the attention, inject again"
        )


def _config_of(stack: nn.Module):
    """The config that a stack's attentions read: the stack's, or their own if the stack has none
    (DistilBERT)."""
    config = getattr(stack, "config", None)
    carriers = (module for module in stack.modules() if SLICE in module.__dict__)
    return next(carriers).config if config is None else config


def _biased(mask: Tensor | None, bias: Tensor | None, causal: bool, query, key) -> Tensor | None:
    """The mask with a position bias (T5) added. A prefix has no position, so its keys get none."""
    if bias is None:
        return mask
    if causal:
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
    bias = bias[..., : key.shape[2]]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _slice_of(module: nn.Module) -> PrefixSlice | QuerySlice | None:
    """The prefix of an attention module, if it acts now."""
    site = module.__dict__.get(SLICE)
    if isinstance(site, RoutedSlice):
        site = site.now()
        if isinstance(site, RoutedSlice):
            return site
    if site is None or not site.on:
        return None
    switch = site.switched.switch
    return None if switch.any_block and switch.is_off() else site


def _attend(module, site, q, k, v, *, mask, causal, dropout, scaling) -> Tensor:
    """Attention with the prefix (B, T, H, D), contiguous; q, k, v (B, H or Hkv, T or S, D)."""
    if isinstance(site, RoutedSlice):
        given = dict(mask=mask, causal=causal, dropout=dropout, scaling=scaling)
        return attend_together(module, site, QKV(q, k, v), **given).transpose(1, 2)
    steps = generation.kept is not None and mask is None and not dropout
    step = next_step(site, q) if steps else None
    if step is not None:
        return step(q, k, v).transpose(1, 2)
    prefix_k, prefix_v = site(q.shape[-1] ** -0.5 if scaling is None else scaling)
    prefix_k, prefix_v = prefix_k.to(q.device), prefix_v.to(q.device)  # layers on many devices
    qkv, prefix = QKV(q, k, v), Prefix(prefix_k, prefix_v)
    known = functional.prefix_attention is _prefix_attention
    kind = _kind(qkv, prefix) if known and not torch.compiler.is_compiling() else None
    if kind is not None and kind == site.checked and _fits(mask, q, k):
        scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        scores, form = Scores(mask, causal, scale), Form(site.form, site.composition)
        if steps:
            keep_step(site, q, prefix_step, k, v, prefix, scores, form)
        out = attention_with_prefix(qkv, prefix, scores, form, float(dropout), module.training)
        return out.transpose(1, 2)
    out = functional.prefix_attention(
        q, k, v, prefix_k, prefix_v, attn_mask=mask, is_causal=causal, scale=scaling,
        form=site.form, composition=site.composition, dropout_p=dropout, training=module.training,
    )  # fmt: skip
    site.checked = kind  # inputs of this kind passed the checks
    return out.transpose(1, 2)


def _kind(qkv: QKV, prefix: Prefix) -> tuple | None:
    """The facts that ``functional.prefix_attention`` checks, except the mask and the sizes of batch
    and context; None if the checks must run."""
    q, k, v = qkv
    kind = q.device.type
    if kind not in ("cpu", "cuda") or torch.is_autocast_enabled(kind) or k.shape != v.shape:
        return None
    devices, dtypes = q.device == k.device == v.device, (q.dtype, k.dtype, v.dtype)
    heads = (q.shape[1], k.shape[1], q.shape[3], k.shape[3])
    small = (prefix.prefix_k.dtype, prefix.prefix_v.dtype, prefix.prefix_k.shape)
    return (q.device, dtypes, heads, small) if devices and q.shape[0] == k.shape[0] else None


def _fits(mask: Tensor | None, q: Tensor, k: Tensor) -> bool:
    """Whether a mask has transformers' form: (B or 1, H or 1, T, S), without a gradient."""
    if mask is None:
        return True
    sizes = mask.dim() == 4 and mask.shape[2:] == (q.shape[2], k.shape[2])
    batch, heads = mask.shape[:2] if sizes else (0, 0)
    known = mask.dtype == torch.bool or mask.is_floating_point()
    fits = batch in (1, q.shape[0]) and heads in (1, q.shape[1])
    return sizes and fits and known and not mask.requires_grad and mask.device == q.device


def sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
         **kwargs):  # fmt: skip
    """Registered for sdpa: mask None or (B, 1 or H, T, S), causality from the module, no
    weights."""
    site = _slice_of(module)
    if site is None:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    if not kwargs.keys() <= KNOWN:
        check_given(module, kwargs)
    queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = queries > 1 and attention_mask is None and causal
    if causal and key.shape[2] > queries:
        # a static cache at prefill: nothing is written after the queries' positions yet
        key, value = key[:, :, :queries], value[:, :, :queries]
    bias = kwargs.get("position_bias")
    mask = _biased(attention_mask, bias, causal, query, key)
    causal = causal and bias is None
    out = _attend(
        module, site, query, key, value, mask=mask, causal=causal, dropout=dropout, scaling=scaling
    )
    return out, None


def eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Registered for eager: additive mask; the scores and weights exist. Runs the reference, and
    returns the context's weights (they sum to 1 - λ) when attentions are requested."""
    site = _slice_of(module)
    if site is None:
        forward = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        return forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                       **kwargs)  # fmt: skip
    check_given(module, kwargs)
    mask = _biased(attention_mask, kwargs.get("position_bias"), False, query, key)
    with backend("reference"):
        out = _attend(
            module, site, query, key, value,
            mask=mask, causal=False, dropout=dropout, scaling=scaling,
        )  # fmt: skip
    wanted = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    weights = _weights(site, query, key, mask, scaling) if wanted else None
    return out, weights


@torch.no_grad()
def _weights(site, query, key, mask, scaling) -> Tensor:
    """softmax over prefix and context: the context's columns (B, H, T, S)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = query.shape[1]
    scores = context_scores(query.float(), expand_heads(key.float(), heads), mask, False, scaling)
    if site.composition == "gated":
        prefix = expand_heads(site(scaling)[0].float(), heads)
        both = torch.cat([scaling * query.float() @ prefix.transpose(-1, -2), scores], -1)
        return torch.softmax(both, -1)[..., prefix.shape[-2] :].to(query.dtype)
    return torch.softmax(scores, -1).to(query.dtype)


def sdpa_mask(*args, dtype: torch.dtype | None = None, **kwargs) -> Tensor | None:
    """Registered for sdpa: its mask (B, 1, T, S), as what is added to the scores in the model's
    ``dtype``. Rows begin at multiples of MASK_ALIGNMENT elements, as the GPU's kernels need."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, dtype=dtype, **kwargs)
    if mask is None or dtype is None or mask.dtype != torch.bool:
        return mask
    mask = additive_mask(mask, dtype)
    return aligned(mask) if mask.is_cuda and mask.shape[-1] % MASK_ALIGNMENT else mask


ALL_ATTENTION_FUNCTIONS.register(_NAME.format("sdpa"), sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME.format("sdpa"), sdpa_mask)
ALL_ATTENTION_FUNCTIONS.register(_NAME.format("eager"), eager)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME.format("eager"), ALL_MASK_ATTENTION_FUNCTIONS["eager"])
