"""The points of the design space that have a meaning, and why the others have none."""

FORMS = ("low_rank", "bottleneck", "prefix", "prompt", "bias", "full")
TARGETS = (
    "attention", "attention.q", "attention.k", "attention.v", "attention.o", "heads", "ffn",
    "ffn.in", "ffn.out", "modules", "embeddings", "model",
)  # fmt: skip
INSERTIONS = ("parallel", "sequential")
COMPOSITIONS = ("add", "scaled", "learned_scale", "learned_channel_scale", "gated")
KINDS = ("encoder", "decoder", "cross")
READS = ("default", "input", "residual", "query")
PLACEMENTS = (
    "default", "before_output", "after_output", "before_dropout", "after_dropout", "after_norm",
    "around_norm",
)  # fmt: skip

# form, target -> (insertion, compositions) pairs that can be built
_LINEARS = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.in", "ffn.out",
            "modules")  # fmt: skip
_SCALED = ("add", "scaled", "learned_scale", "learned_channel_scale")
GRID: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    **{("low_rank", target): {"parallel": ("add", "scaled")} for target in _LINEARS},
    ("bottleneck", "attention"): {"sequential": _SCALED, "parallel": _SCALED},
    ("bottleneck", "ffn"): {"sequential": _SCALED, "parallel": _SCALED},
    ("bottleneck", "heads"): {"parallel": ("add", "scaled")},
    ("prefix", "heads"): {"parallel": ("gated", "add")},
    ("prompt", "embeddings"): {"parallel": ("gated",)},
    ("bias", "model"): {"parallel": ("add",)},
    ("full", "model"): {"parallel": ("add",)},
}
# where an update may be read and added, the paper's place first
PLACES: dict[tuple[str, str] | None, tuple[str, ...]] = {
    ("attention", "parallel"): ("before_output", "after_output"),
    ("attention", "sequential"): ("after_output",),
    ("heads", "parallel"): ("before_output",),
    ("ffn", "parallel"): ("after_dropout", "before_dropout"),
    ("ffn", "sequential"): ("after_dropout", "after_norm", "around_norm"),
}
READ_AT: dict[tuple[str, str] | None, tuple[str, ...]] = {
    ("heads", "parallel"): ("input", "query"),
    ("ffn", "parallel"): ("input", "residual"),
}
# why a point has no meaning; the first reason that applies
REASONS = (
    (lambda m: m.composition == "gated", "a gate is the softmax mass of a prefix's own keys"),
    (lambda m: m.form == "low_rank" and m.insertion == "sequential",
     "a low-rank update is one of a weight and reads what the weight reads"),
    (lambda m: m.form == "low_rank" and m.composition.startswith("learned"),
     "its second factor trains without a bound and is scale enough"),
    (lambda m: m.form == "low_rank", "a low-rank update is one of a weight matrix"),
    (lambda m: m.form == "prefix", "a prefix is keys and values of an attention's heads"),
    (lambda m: m.form == "prompt", "a prompt is vectors in front of the input embeddings"),
    (lambda m: m.form in ("bias", "full"), "what trains is the model's own"),
    (lambda m: m.target == "heads", "heads take an update beside what they attend to"),
    (lambda m: "." in m.target, "a bottleneck reads and writes a whole sub-layer"),
)  # fmt: skip
