"""The presets: the paper's methods at the paper's settings (PAPER Table 8, appendix A)."""

from .config import Modification, PeltConfig


def _lora(target: str, size: int, scale: float) -> Modification:
    return Modification(
        "low_rank", target, composition="scaled", size=size, scale=scale, dropout=0.1
    )


def _adapter(target: str, size: int, insertion: str, scale: float = 1.0, **details) -> Modification:
    composition = "add" if scale == 1 else "scaled"
    return Modification(
        "bottleneck", target, insertion, composition, size, scale, dropout=0.1, **details
    )


def _prefix(size: int) -> Modification:
    return Modification("prefix", "heads", composition="gated", size=size)


def _mam(name: str, prefix: int, bottleneck: int, scale: float) -> PeltConfig:
    ffn = _adapter("ffn", bottleneck, "parallel", scale)
    return PeltConfig(name, (_prefix(prefix), ffn))


_SEQUENTIAL = dict(insertion="sequential", init="bert", layer_norm="in")

_PRESETS = (
    PeltConfig("full", (Modification("full", "model"),)),
    PeltConfig("linear_probe"),
    PeltConfig("lora", (_lora("attention.q", 16, 2.0), _lora("attention.v", 16, 2.0))),
    PeltConfig("lora_ffn", (_lora("ffn.in", 102, 4.0), _lora("ffn.out", 102, 4.0))),
    PeltConfig("prefix", (_prefix(200),)),
    PeltConfig(
        "houlsby",
        (_adapter("attention", 200, **_SEQUENTIAL), _adapter("ffn", 200, **_SEQUENTIAL)),
    ),
    PeltConfig("scaled_parallel_adapter", (_adapter("ffn", 512, "parallel", 4.0),)),
    _mam("mam", 30, 512, 4.0),
    _mam("mam_glue", 16, 16, 2.0),
)


def methods() -> dict[str, PeltConfig]:
    """The presets by name, each a :class:`PeltConfig`."""
    return {config.name: config for config in _PRESETS}


def method(name: str) -> PeltConfig:
    """The preset ``name``; ValueError lists them when there is none."""
    presets = methods()
    if name not in presets:
        raise ValueError(f"unknown method {name!r}: choose {', '.join(presets)}")
    return presets[name]
