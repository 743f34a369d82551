"""The design space of the paper (Table 1) as data: a config is a list of modifications.

Each :class:`Modification` is one point of the four dimensions: functional form, modified
representation (``target``), insertion, composition; the rest of its fields are details.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field

from pelt_fast.reference.activations import ACTIVATIONS

FORMS = ("low_rank", "bottleneck", "prefix", "full")
TARGETS = (
    "attention", "attention.q", "attention.k", "attention.v", "attention.o", "heads", "ffn",
    "ffn.in", "ffn.out", "model",
)  # fmt: skip
INSERTIONS = ("parallel", "sequential")
COMPOSITIONS = ("add", "scaled", "learned_scale", "learned_channel_scale", "gated")
KINDS = ("encoder", "decoder", "cross")

# form, target -> (insertion, compositions) pairs that can be built
_LINEARS = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.in", "ffn.out")
_SCALED = ("add", "scaled", "learned_scale", "learned_channel_scale")
_GRID = {
    **{("low_rank", target): {"parallel": ("add", "scaled")} for target in _LINEARS},
    ("bottleneck", "attention"): {"sequential": _SCALED},
    ("bottleneck", "ffn"): {"sequential": _SCALED, "parallel": _SCALED},
    ("prefix", "heads"): {"parallel": ("gated", "add")},
    ("full", "model"): {"parallel": ("add",)},
}


@dataclass(frozen=True)
class Modification:
    """One modification of the frozen model.

    form: "low_rank" (LoRA), "bottleneck" (adapter), "prefix", "full" (every weight trains).
    target: what is modified. insertion: "parallel" reads the target's input, "sequential" its
    output. composition: "add" h + Δh; "scaled" h + s Δh; "learned_scale" with s trained from
    ``scale`` (scalar) or "learned_channel_scale" (per channel); "gated" (1 - λ) h + λ Δh.
    size: rank R, bottleneck R or prefix length P. dropout: on a LoRA's input or an adapter's
    bottleneck. layer_norm: of an adapter, "none", "in" or "out". init: "lora" (Kaiming down, zero
    up) or "bert" (normal 0.02). where: which attention / stacks ("encoder", "decoder", "cross").
    reparameterization: of a prefix, "mlp" (embedding, Linear, Tanh, Linear) or "none";
    mlp_dim its hidden width.
    """

    form: str
    target: str
    insertion: str = "parallel"
    composition: str = "add"
    size: int = 0
    scale: float = 1.0
    activation: str = "relu"
    init: str = "lora"
    dropout: float = 0.0
    layer_norm: str = "none"
    where: tuple[str, ...] = KINDS
    reparameterization: str = "mlp"
    mlp_dim: int = 800

    def __post_init__(self):
        object.__setattr__(self, "where", tuple(self.where))
        for name, options in (
            ("form", FORMS), ("target", TARGETS), ("insertion", INSERTIONS),
            ("composition", COMPOSITIONS), ("activation", ACTIVATIONS), ("init", ("lora", "bert")),
            ("layer_norm", ("none", "in", "out")), ("reparameterization", ("mlp", "none")),
        ):  # fmt: skip
            _one_of(name, getattr(self, name), options)
        for kind in self.where:
            _one_of("where", kind, KINDS)
        self._check_point()
        self._check_numbers()

    def _check_point(self):
        """Refuse a point of the grid that cannot be built, with the nearest one that can."""
        point = f"{self.insertion} {self.form} on {self.target}, composition {self.composition!r}"
        insertions = _GRID.get((self.form, self.target))
        if insertions is None:
            targets = ", ".join(target for form, target in _GRID if form == self.form)
            raise ValueError(f"{point}: {self.form} can target {targets}")
        if self.insertion not in insertions:
            raise ValueError(f"{point}: insertion can be {', '.join(insertions)} there")
        if self.composition not in insertions[self.insertion]:
            raise ValueError(
                f"{point}: composition can be {', '.join(insertions[self.insertion])} there"
            )
        if self.composition == "add" and self.scale != 1:
            raise ValueError(f"{point}: scale must be 1, got {self.scale}; use 'scaled'")

    def _check_numbers(self):
        if self.form != "full" and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"size (rank, bottleneck or prefix length) must be an integer >= 1,"
                             f" got {self.size!r}")  # fmt: skip
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not isinstance(self.mlp_dim, int) or self.mlp_dim < 1:
            raise ValueError(f"mlp_dim must be an integer >= 1, got {self.mlp_dim!r}")


def _one_of(name: str, value, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")


@dataclass(frozen=True)
class PeltConfig:
    """A method: its modifications, whether the task head trains, the trainable tensors' dtype.

    ``dtype`` is "float32" (master weights beside a bf16 base), "bfloat16", "float16" or
    "float64"; it is raised to the base's own precision where that is higher.
    """

    name: str
    modifications: tuple[Modification, ...] = field(default=())
    train_head: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "modifications", tuple(self.modifications))
        _one_of("dtype", self.dtype, ("float32", "bfloat16", "float16", "float64"))
        for modification in self.modifications:
            if not isinstance(modification, Modification):
                raise TypeError(
                    f"modifications must hold Modification, got {type(modification).__name__}"
                )
        if self.is_full and len(self.modifications) > 1:
            raise ValueError("full fine-tuning already trains every weight: it stands alone")
        seen = set()
        for m in self.modifications:
            for kind in m.where:
                if (m.form, m.target, kind) in seen:
                    raise ValueError(f"two {m.form} modifications of {m.target} in {kind!r}")
                seen.add((m.form, m.target, kind))

    @property
    def is_full(self) -> bool:
        """Whether this is full fine-tuning."""
        return any(m.form == "full" for m in self.modifications)

    def replace(self, **changes) -> "PeltConfig":
        """A copy with the given Modification fields changed in every modification; raises what
        Modification raises, and TypeError for an unknown field."""
        modifications = [dataclasses.replace(m, **changes) for m in self.modifications]
        return dataclasses.replace(self, modifications=tuple(modifications))

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "PeltConfig":
        """The inverse of :meth:`to_json`; raises ValueError that names an unknown field."""
        raw = json.loads(text)
        try:
            raw["modifications"] = [Modification(**m) for m in raw.get("modifications", [])]
            return cls(**raw)
        except TypeError as error:
            raise ValueError(f"not a pelt_fast config of this version: {error}") from None
