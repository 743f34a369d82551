"""The presets: the paper's methods at the paper's settings (Table 8, appendix A)."""

from typing import Any

from pelt_fast.config import Modification, PeltConfig


def _lora(target: str, size: int, scale: float) -> Modification:
    return Modification(
        "low_rank", target, composition="scaled", size=size, scale=scale, dropout=0.1
    )


def _adapter(
    target: str, size: int, insertion: str, scale: float = 1.0, **details: Any
) -> Modification:
    composition = "add" if scale == 1 else "scaled"
    return Modification(
        "bottleneck", target, insertion, composition, size, scale, dropout=0.1, **details
    )


def _prefix(size: int, composition: str = "gated", **details: Any) -> Modification:
    return Modification("prefix", "heads", composition=composition, size=size, **details)


def _mam(name: str, prefix: int, bottleneck: int, scale: float) -> PeltConfig:
    ffn = _adapter("ffn", bottleneck, "parallel", scale)
    return PeltConfig(name, (_prefix(prefix), ffn))


# the paper's code gives attention adapters a LayerNorm; its scripts give FFN adapters none
_SEQUENTIAL: dict[str, Any] = dict(insertion="sequential", init="bert")
_PARALLEL_ATTENTION: dict[str, Any] = dict(insertion="parallel", init="bert", layer_norm="in")
_PARALLEL: dict[str, Any] = dict(insertion="parallel", init="bert")
# on the query: the attention's own dropout acts
_HEADS = Modification("bottleneck", "heads", size=200, init="bert", reads="query")
_LORA_FFN = (_lora("ffn.in", 102, 4.0), _lora("ffn.out", 102, 4.0))

_PRESETS = (
    PeltConfig("full", (Modification("full", "model"),)),
    PeltConfig("linear_probe"),
    PeltConfig("bitfit", (Modification("bias", "model"),)),
    PeltConfig("prompt", (Modification("prompt", "embeddings", composition="gated", size=200),)),
    PeltConfig("prefix", (_prefix(200),)),
    PeltConfig("prefix_ungated", (_prefix(30, "add"),)),
    PeltConfig("prefix_nomlp", (_prefix(200, reparameterization="none"),)),
    PeltConfig("lora", (_lora("attention.q", 16, 2.0), _lora("attention.v", 16, 2.0))),
    PeltConfig("lora_ffn", _LORA_FFN),
    PeltConfig(
        "houlsby",
        (
            _adapter("attention", 200, **_SEQUENTIAL, layer_norm="in"),
            _adapter("ffn", 200, **_SEQUENTIAL),
        ),
    ),
    PeltConfig(
        "pfeiffer",
        (_adapter("ffn", 600, "sequential", init="bert", placement="around_norm"),),
    ),
    PeltConfig("parallel_adapter_attn", (_adapter("attention", 200, **_PARALLEL_ATTENTION),)),
    PeltConfig("parallel_adapter_ffn", (_adapter("ffn", 1024, **_PARALLEL),)),
    PeltConfig("multi_head_parallel_adapter", (_HEADS,)),
    PeltConfig("scaled_parallel_adapter", (_adapter("ffn", 512, "parallel", 4.0),)),
    PeltConfig(
        "learned_scale_parallel_adapter",
        (Modification("bottleneck", "ffn", "parallel", "learned_scale", 512, dropout=0.1),),
    ),
    PeltConfig(
        "parallel_attn_parallel_ffn",
        (_adapter("attention", 30, **_PARALLEL_ATTENTION), _adapter("ffn", 512, **_PARALLEL)),
    ),
    PeltConfig("prefix_lora_ffn", (_prefix(30), *_LORA_FFN)),
    _mam("mam", 30, 512, 4.0),
    _mam("mam_glue", 16, 16, 2.0),
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
