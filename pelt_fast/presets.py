"""The presets: the paper's methods at the paper's settings (Table 8, appendix A)."""

import dataclasses

from pelt_fast.builders import (
    adapter,
    bitfit,
    lora,
    multi_head_adapter,
    parallel_adapter,
    prefix,
    prompt,
)
from pelt_fast.config import Modification, PeltConfig


def _named(name: str, config: PeltConfig) -> PeltConfig:
    return dataclasses.replace(config, name=name)


_LORA_FFN = lora(r=102, alpha=408, targets="ffn.in,ffn.out")
_PRESETS = (
    PeltConfig("full", (Modification("full", "model"),)),
    PeltConfig("linear_probe"),
    bitfit(),
    prompt(200),
    prefix(200),
    _named("prefix_ungated", prefix(30, gated=False)),
    _named("prefix_nomlp", prefix(200, mlp=False)),
    lora(r=16, alpha=32),
    _named("lora_ffn", _LORA_FFN),
    _named("houlsby", adapter(200)),
    _named("pfeiffer", adapter(600, after="ffn", placement="around_norm")),
    _named("parallel_adapter_attn", parallel_adapter(200, beside="attention", init="bert")),
    _named("parallel_adapter_ffn", parallel_adapter(1024, init="bert")),
    _named("multi_head_parallel_adapter", multi_head_adapter(200)),
    _named("scaled_parallel_adapter", parallel_adapter(512, scale=4)),
    _named("learned_scale_parallel_adapter", parallel_adapter(512, scale="learned")),
    _named(
        "parallel_attn_parallel_ffn",
        parallel_adapter(30, beside="attention", init="bert") + parallel_adapter(512, init="bert"),
    ),
    _named("prefix_lora_ffn", prefix(30) + _LORA_FFN),
    _named("mam", prefix(30) + parallel_adapter(512, scale=4)),
    _named("mam_glue", prefix(16) + parallel_adapter(16, scale=2)),
)

# parameters of a modification in one sub-layer: r or l its size, d the model's width, dm the FFN's
_FORMULAS = {
    ("low_rank", "attention"): "2 r d",
    ("low_rank", "ffn"): "r (d + dm)",
    ("bottleneck", "attention"): "2 r d",
    ("bottleneck", "ffn"): "2 r d",
    ("bottleneck", "heads"): "2 r d",
    ("prefix", "heads"): "2 l d",
}


def formula(modification: Modification) -> str:
    """Its parameters as the paper counts them (appendix B): matrices, by sub-layer."""
    if modification.form == "prompt":
        return "l d, once"
    if modification.form in ("bias", "full"):
        return "the model's biases" if modification.form == "bias" else "the model"
    group = modification.target.split(".")[0]
    if group == "modules":
        return "r (K + N) a layer"
    sublayer = "FFN" if group == "ffn" else "attention"
    return f"{_FORMULAS[modification.form, group]} an {sublayer}"


def methods() -> dict[str, PeltConfig]:
    """The presets: the paper's methods at the paper's settings (Table 8, appendix A).

    Returns:
        Each :class:`PeltConfig` by its name.

    Example:
        >>> methods()["mam"].modifications[0].form
        'prefix'
    """
    return {config.name: config for config in _PRESETS}


def method(name: str) -> PeltConfig:
    """The preset ``name``; ValueError lists the known ones."""
    presets = methods()
    if name not in presets:
        raise ValueError(f"unknown method {name!r}: choose {', '.join(presets)}")
    return presets[name]
