"""The configs that AdapterHub's format has for a method; ValueError where it has none."""

from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.layouts.lookup import base_of, stacks_of

from .adapterhub_config import ACTIVATIONS, COMPARED

# AdapterHub's names of activations, by ours
_NAMES = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}


def configs_of(model: nn.Module, config: PeltConfig) -> list[dict]:
    """The configs of a method: one for its prefix, its LoRA and its bottlenecks each."""
    loras = [m for m in config.modifications if m.form == "low_rank"]
    bottlenecks = [m for m in config.modifications if m.form == "bottleneck"]
    prefixes = [m for m in config.modifications if m.form == "prefix"]
    others = [m for m in config.modifications if m not in loras + bottlenecks + prefixes]
    if others or not config.modifications:
        raise ValueError(f"AdapterHub's format has no place for {config.name!r}")
    if any(m.layers is not None for m in config.modifications):
        raise ValueError("AdapterHub's format is written of methods on every layer alone")
    model_type = base_of(model).config.model_type
    kinds = (("prefix_tuning", prefixes), ("lora", loras), ("bottleneck", bottlenecks))
    for kind, modifications in kinds:
        if modifications and model_type not in COMPARED[kind]:
            raise ValueError(
                f"AdapterHub's {kind} is not written for {model_type!r}; it is for"
                f" {', '.join(COMPARED[kind])}"
            )
    if len(prefixes) > 1:
        raise ValueError(f"AdapterHub's format has one prefix, this method has {len(prefixes)}")
    configs = [_prefix_config(model, m) for m in prefixes]
    if loras:
        configs.append(_lora_config(model, loras))
    if bottlenecks:
        configs.append(_bottleneck_config(model, bottlenecks))
    return configs


def _prefix_config(model: nn.Module, m: Modification) -> dict:
    if m.composition != "gated":
        raise ValueError("AdapterHub's prefix is gated: an ungated one has no place in its format")
    if len(stacks_of(model)) > 1 and "decoder" not in m.where:
        raise ValueError("AdapterHub's prefix is always on a decoder: this one is not")
    return dict(
        architecture="prefix_tuning", encoder_prefix="encoder" in m.where,
        cross_prefix="cross" in m.where, flat=True, prefix_length=m.size, bottleneck_size=512,
        non_linearity="tanh", dropout=0.0, use_gating=False, shared_gating=True, leave_out=[],
    )  # fmt: skip


def _kinds(model: nn.Module, m: Modification) -> set[str]:
    """The kinds of attentions or stacks that a modification's target has in the model."""
    stacks = stacks_of(model)
    if m.target.startswith("ffn"):
        return {stack.kind for stack in stacks}
    kinds = {attention.kind for stack in stacks for attention in stack.attentions}
    return kinds if len(stacks) > 1 else kinds - {"cross"}


def _lora_config(model: nn.Module, loras: list[Modification]) -> dict:
    if any(m.modules or m.patterns for m in loras):
        raise ValueError("AdapterHub's format has no LoRA by name and no patterns")
    letters = [m.target[-1] for m in loras if m.target.startswith("attention")]
    kinds = {(m.size, m.scale, m.dropout) for m in loras}
    everywhere = all(_kinds(model, m) <= set(m.where) for m in loras)
    if "o" in letters or len(kinds) > 1 or not everywhere:
        raise ValueError("AdapterHub's LoRA has one rank, scale and dropout, everywhere, on q, k, v"
                         " and the FFN")  # fmt: skip
    targets = {m.target for m in loras}
    gated = any(stack.ffn is not None and stack.ffn.gate_proj for stack in stacks_of(model))
    if gated and len(letters) < len(loras):
        raise ValueError(
            "AdapterHub's LoRA is on one matrix of a gated FFN alone, here it is on both"
        )
    return dict(
        architecture="lora", selfattn_lora=bool(letters), intermediate_lora="ffn.in" in targets,
        output_lora="ffn.out" in targets, attn_matrices=letters or ["q", "v"], r=loras[0].size,
        alpha=loras[0].scale * loras[0].size, dropout=loras[0].dropout, composition_mode="add",
        init_weights="lora", use_gating=False, use_dora=False, leave_out=[],
    )  # fmt: skip


def _bottleneck_config(model: nn.Module, bottlenecks: list[Modification]) -> dict:
    first, hidden = bottlenecks[0], base_of(model).config.hidden_size
    by_target = {m.target: m for m in bottlenecks}
    if len(by_target) < len(bottlenecks) or not _can_be_written(model, by_target):
        raise ValueError("AdapterHub's format holds bottlenecks of one size, parallel on the FFN,"
                         " reading the residual stream, or sequential: not these")  # fmt: skip
    scaling = {"learned_scale": "learned", "learned_channel_scale": "channel"}
    where = by_target["attention"].where if "attention" in by_target else ()
    return dict(
        mh_adapter="encoder" in where or "decoder" in where, cross_adapter="cross" in where,
        output_adapter="ffn" in by_target, reduction_factor=hidden / first.size,
        non_linearity=_NAMES[first.activation], original_ln_before=False, original_ln_after=True,
        ln_before=first.layer_norm == "in", ln_after=first.layer_norm == "out",
        init_weights="mam_adapter" if first.init == "lora" else "bert",
        is_parallel=first.insertion == "parallel",
        scaling=scaling.get(first.composition, float(first.scale)), use_gating=False,
        residual_before_ln=True, adapter_residual_before_ln=False, dropout=0.0, inv_adapter=None,
        inv_adapter_reduction_factor=None, phm_layer=False, leave_out=[], stochastic_depth=0.0,
    )  # fmt: skip


def _can_be_written(model: nn.Module, by_target: dict[str, Modification]) -> bool:
    """Whether one AdapterHub config can say what these bottlenecks are."""
    bottlenecks, hidden = list(by_target.values()), base_of(model).config.hidden_size
    first, ffn = bottlenecks[0], by_target.get("ffn")
    equal = {(m.insertion, m.composition, m.size, m.scale, m.activation, m.layer_norm)
             for m in bottlenecks}  # fmt: skip
    placements = ("default", "after_dropout", "after_output")
    if len(equal) > 1 or first.activation not in _NAMES or "heads" in by_target:
        return False
    if any(m.placement not in placements or not m.residual for m in bottlenecks):
        return False
    if first.insertion == "parallel":
        is_post_norm = all(s.ffn is None or s.ffn.norm is None for s in stacks_of(model))
        if "attention" in by_target or not (is_post_norm or _reads_residual(model, ffn)):
            return False
    if ffn is not None and not _kinds(model, ffn) <= set(ffn.where):
        return False
    return int(hidden // (hidden / first.size)) == first.size


def _reads_residual(model: nn.Module, m: Modification) -> bool:
    reads = {stack.ffn.adapter_reads if m.reads == "default" else m.reads
             for stack in stacks_of(model)}  # fmt: skip
    return reads == {"residual"}
