"""A method in plain torch, for a model that has none inside: hooks add each site's update by its
formula, and an attention function concatenates the prefix with keys and values.

Nothing here calls an op of pelt_fast. Dropouts are off: the models are in evaluation mode.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pelt_fast.modules.heads import MultiHeadAdapter, QueryHeads
from pelt_fast.modules.lora import LoRALinear
from pelt_fast.modules.prefix import PrefixBank
from pelt_fast.modules.projection_view import ProjectionView, host_of

NAME, SITE = "benchmarks_textbook_{}", "benchmarks_textbook_site"
_ACTIVATIONS: dict[str, Callable] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
Leaves = dict[str, Tensor]


def attach(twin: nn.Module, injected: nn.Module) -> Leaves:
    """Put the updates of ``injected``'s sites on ``twin``, a copy of its base model without a
    method; return the method's tensors there, by their names in ``injected``."""
    own = {p: n for n, p in injected.named_parameters() if "pelt_" in n}
    leaves = {n: p.detach().clone().requires_grad_() for p, n in own.items()}
    names = {module: name for name, module in injected.named_modules()}
    banks: dict[nn.Module, Tensor] = {}
    for site in injected._pelt.sites:
        tensors = {n: leaves[own[p]] for n, p in site.module.named_parameters() if p in own}
        if "attention" in site.details:
            _attach_to_attention(twin, names, site, tensors, banks)
        else:
            _attach_hooks(twin, names, site.module, tensors)
    return leaves


def _attach_hooks(twin: nn.Module, names: dict, site: nn.Module, tensors: Leaves) -> None:
    """Forward hooks for one site, by the kind of its module."""

    def at(module: nn.Module) -> nn.Module:
        owner = module.owner if isinstance(module, ProjectionView) else host_of(module)
        return twin.get_submodule(names[owner])

    kind, update, kept = type(site).__name__, _update_of(site, tensors), Kept()
    if isinstance(site, LoRALinear):
        linear = site.frozen.module
        rows = linear.rows if isinstance(linear, ProjectionView) else None
        at(linear).register_forward_hook(lambda m, args, y: _added(y, update(args[0]), rows))
    elif kind in ("SequentialAdapter", "LayerAdapter"):
        at(site.frozen.module).register_forward_hook(lambda m, args, y: _sequential(y, update))
    elif kind == "NormAdapter":
        norm = at(site.frozen.module)
        norm.register_forward_hook(lambda m, args, y: m.forward(args[0] + update(y)))
    elif kind == "SequentialFFNAdapter":
        at(_end(site.ffn)).register_forward_hook(lambda m, args, y: _sequential(y, update))
    elif kind in ("ParallelAttentionAdapter", "MultiHeadAdapter"):
        reader = _module_with(names, site.kept_input)
        twin.get_submodule(names[reader]).register_forward_pre_hook(kept, with_kwargs=True)
        _add_at_output(at(site.frozen.module), site, update, kept)
    elif kind in ("ParallelFFNAdapter", "ResidualFFNAdapter"):
        begin = site.ffn.in_proj.module if site.ffn.block is None else site.ffn.block.module
        reader = _module_with(names, site.kept_input) if kind.startswith("R") else begin
        at(reader).register_forward_pre_hook(kept, with_kwargs=True)
        at(_end(site.ffn)).register_forward_hook(lambda m, args, y: y + update(kept.x))
    else:
        raise TypeError(f"no formula for a {kind}")


def _add_at_output(out: nn.Module, site: nn.Module, update: Callable, kept: "Kept") -> None:
    if getattr(site, "before_output", True):
        out.register_forward_pre_hook(lambda m, args: (args[0] + update(kept.x), *args[1:]))
    else:
        out.register_forward_hook(lambda m, args, y: y + update(kept.x))


class Kept:
    """Forward pre-hook that keeps the input of a module."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.x = args[0] if args else kwargs["hidden_states"]


def _module_with(names: dict, hook: Callable) -> nn.Module:
    return next(m for m in names if hook in m._forward_pre_hooks.values())


def _end(ffn) -> nn.Module:
    """The module whose output is the block's."""
    return ffn.out_proj.module if ffn.block is None else ffn.block.module


def _sequential(y, update: Callable):
    """h + update(h), where h is a tensor or the first of a tuple."""
    return (_sequential(y[0], update), *y[1:]) if isinstance(y, tuple) else y + update(y)


def _added(y: Tensor, update: Tensor, rows: slice | Tensor | None) -> Tensor:
    if rows is None:
        return y + update
    y = y.clone()
    y[..., rows] += update
    return y


def _update_of(site: nn.Module, t: Leaves) -> Callable[[Tensor], Tensor]:
    if isinstance(site, LoRALinear):
        return lambda x: site.scale * F.linear(F.linear(x, t["lora_a"]), t["lora_b"])
    if isinstance(site, MultiHeadAdapter | QueryHeads):
        return lambda x: _by_head(site, t, x)
    return lambda x: _bottleneck(site, t, x)


def _bottleneck(site: nn.Module, t: Leaves, x: Tensor) -> Tensor:
    if site.layer_norm == "in":
        x = F.layer_norm(x, x.shape[-1:], t["norm.weight"], t["norm.bias"])
    inner = _ACTIVATIONS[site.activation](F.linear(x, t["down_weight"], t["down_bias"]))
    return t.get("scale", site.scale) * F.linear(inner, t["up_weight"], t["up_bias"])


def _by_head(site: nn.Module, t: Leaves, x: Tensor) -> Tensor:
    """A bottleneck for each head, on the slices (B, T, H, D) of ``x``."""
    down, up = t["down_weight"], t["up_weight"]  # (H, R, D)
    x = x.unflatten(-1, (down.shape[0], -1))
    inner = torch.relu(torch.einsum("bthd,hrd->bthr", x, down))
    return site.scale * torch.einsum("bthr,hrd->bthd", inner, up).flatten(-2)


def _attach_to_attention(twin: nn.Module, names: dict, site, tensors: Leaves, banks: dict) -> None:
    """Give the attention of one site a prefix, and its configs the function that reads it."""
    attention, module = site.details["attention"], site.module
    if isinstance(module, PrefixBank):
        if module not in banks:
            banks[module] = torch.func.functional_call(module, tensors)
        index = attention.__dict__["pelt_prefix_slice"].index
        given = banks[module][index]
    else:
        given = torch.stack([tensors["down_weight"], tensors["up_weight"]])
    slice_ = attention.__dict__["pelt_prefix_slice"]
    vars(twin.get_submodule(names[attention]))[SITE] = (given, slice_.form, slice_)
    for part in twin.modules():
        for value in vars(part).values():
            if isinstance(value, PreTrainedConfig):
                choice = value._attn_implementation_internal
                if choice in ("sdpa", "eager", None):
                    value._attn_implementation_internal = NAME.format(choice or "eager")


def textbook(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """Attention written out, with keys and values of a prefix in front of the others."""
    scaling, mask = query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = scaling * query @ key.transpose(-1, -2)
    if mask is None and query.shape[2] > 1 and module.config._attn_implementation.endswith("sdpa"):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(
                1 + scores.shape[-1] - scores.shape[-2]
            )
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    for bias in (mask, kwargs.get("position_bias")):
        if bias is not None and bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, torch.finfo(scores.dtype).min)
        elif bias is not None:
            scores = scores + bias[..., : key.shape[-2]]
    given, form, slice_ = vars(module).get(SITE, (None, "softmax", None))
    if given is None:
        return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None
    prefix_k, prefix_v = (p.repeat_interleave(group, 0) for p in given)
    theirs = query @ prefix_k.transpose(-1, -2)  # (B, H, T, P)
    out = _combined(slice_, form, scaling, scores, theirs, value, prefix_v)
    return out.transpose(1, 2).contiguous(), None


def _combined(slice_, form: str, scaling, scores, theirs, value, prefix_v) -> Tensor:
    if form == "relu":
        scale = slice_.heads.scale
        return torch.softmax(scores, -1) @ value + scale * torch.relu(theirs) @ prefix_v
    theirs = scaling * theirs
    if slice_.composition == "gated":
        both = torch.softmax(torch.cat([theirs, scores], -1), -1)
        return both @ torch.cat([prefix_v.expand(*value.shape[:1], -1, -1, -1), value], 2)
    return torch.softmax(scores, -1) @ value + torch.softmax(theirs, -1) @ prefix_v


for _choice in ("sdpa", "eager"):
    ALL_ATTENTION_FUNCTIONS.register(NAME.format(_choice), textbook)
    ALL_MASK_ATTENTION_FUNCTIONS.register(
        NAME.format(_choice), ALL_MASK_ATTENTION_FUNCTIONS[_choice]
    )
