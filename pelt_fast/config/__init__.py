"""The design space of the paper (Table 1) as data: a config is a list of modifications.

Each :class:`Modification` is one point of the four dimensions: functional form, modified
representation (``target``), insertion, composition; the rest of its fields are details. The grid of
the points that have a meaning is in ``grid``, what a LoRA is on by name in ``named_modules``.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from pelt_fast.ops.common.activations import ACTIVATIONS

from .grid import (
    COMPOSITIONS,
    FORMS,
    GRID,
    INSERTIONS,
    KINDS,
    PLACEMENTS,
    PLACES,
    READ_AT,
    READS,
    REASONS,
    TARGETS,
)
from .named_modules import ALL_LINEAR, MODULES, Pattern, checked_modules, checked_patterns

_OF_NO_LAYER = ("prompt", "bias", "full")


@dataclass(frozen=True)
class Modification:
    """One modification of the frozen model: a point of the paper's design space (Table 1).

    Where libraries differ, the default is that of the paper's code (except ``reads`` on heads).

    Args:
        form: the functional form. "low_rank" (LoRA), "bottleneck" (adapter; on "heads" one for each
            head), "prefix", "prompt" (vectors in front of the input), "bias" (BitFit: the model's
            own biases) or "full".
        target: what is modified: "attention", "attention.q", "attention.k", "attention.v",
            "attention.o", "heads", "ffn", "ffn.in", "ffn.out", "modules" (a LoRA's, by name),
            "embeddings" or "model".
        insertion: "parallel" reads the target's input, "sequential" its output.
        composition: "add" h + Δh; "scaled" h + s Δh; "learned_scale", s trained from ``scale`` (a
            scalar), or "learned_channel_scale" (one for each channel); "gated" (1 - λ) h + λ Δh.
        size: the rank or bottleneck R, or the length P of a prefix or prompt.
        scale: s.
        activation: f of a bottleneck: "identity", "relu", "gelu", "gelu_tanh", "silu" or "tanh".
        init: "lora" (Kaiming down, zero up) or "bert" (normal 0.02).
        dropout: the probability on a LoRA's input or an adapter's bottleneck, in [0, 1). For a
            prefix, and a bottleneck that reads the query, the attention's own dropout acts instead.
        layer_norm: of an adapter: "none", "in" or "out".
        where: which attentions and stacks: "encoder", "decoder", "cross". A prompt goes to the
            model's first stack.
        reparameterization: of a prefix: "mlp" (embedding, Linear, Tanh, Linear) or "none".
        mlp_dim: the hidden width of that MLP.
        reads: of a parallel FFN adapter "input" (the block's) or "residual" (the stream before a
            pre-norm; mBART's default); of a bottleneck on heads "input" (the attention's, split by
            head, with a down projection of its own: Table 1, default) or "query" (the frozen query
            projection is used again: the paper's code, and ``multi_head_parallel_adapter``).
        placement: of a parallel attention adapter "before_output" (added to the heads, default) or
            "after_output" (to the projected output); of an FFN adapter "after_dropout" (default),
            "before_dropout" (parallel), "after_norm" (sequential: on the layer's output) or
            "around_norm" (sequential, Pfeiffer: of a post-norm block y of x,
            LN(Δ(LN(y + x)) + y + x); of a pre-norm one, where nothing normalises the sum,
            y + x + Δ(y + x)).
        residual: whether a sequential adapter adds its input to its update.
        layers: the layers of each stack in ``where`` that have it, from 0; None is all of them. Of
            modules by name: the first number in a name.
        modules: of the target "modules": "all-linear", a regular expression that a whole name must
            match, or endings of names. The names are those of the model that is injected.
        patterns: of a LoRA: (regular expression, size, scale), for the modules whose name, or an
            ending of it, matches.
        rslora: of a LoRA: whether ``scale`` is alpha over the square root of ``size``. A later
            change of the rank keeps alpha (``pelt_fast.inject(model, config, r=8)``).

    Raises:
        ValueError: a field has another value, or the point has no meaning; the message names the
            nearest one that has.

    Example:
        >>> Modification("low_rank", "attention.q", size=8, scale=2.0, composition="scaled").size
        8
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
    reads: str = "default"
    placement: str = "default"
    residual: bool = True
    layers: tuple[int, ...] | None = None
    modules: str | tuple[str, ...] | None = None
    patterns: tuple[Pattern, ...] = ()
    rslora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", tuple(self.where))
        for name, options in (
            ("form", FORMS), ("target", TARGETS), ("insertion", INSERTIONS),
            ("composition", COMPOSITIONS), ("activation", ACTIVATIONS), ("init", ("lora", "bert")),
            ("layer_norm", ("none", "in", "out")), ("reparameterization", ("mlp", "none")),
            ("reads", READS), ("placement", PLACEMENTS), ("residual", (True, False)),
            ("rslora", (True, False)),
        ):  # fmt: skip
            _one_of(name, getattr(self, name), options)
        for kind in self.where:
            _one_of("where", kind, KINDS)
        self._check_point()
        self._check_numbers()
        self._check_layers()
        self._check_names()

    def _check_point(self) -> None:
        """Refuse a point of the grid without meaning, and name the nearest point with a meaning."""
        point = _described(self.insertion, self.form, self.target, self.composition)
        if self.composition not in GRID.get((self.form, self.target), {}).get(self.insertion, ()):
            reasons = [reason for applies, reason in REASONS if applies(self)]
            why = reasons[0] if reasons else "no module is built there"
            raise ValueError(f"{point} has no meaning: {why}. The nearest is {self._nearest()}")
        if self.composition == "add" and self.scale != 1:
            raise ValueError(f"{point}: scale must be 1, got {self.scale}; use 'scaled'")
        key = (self.target, self.insertion) if self.form == "bottleneck" else None
        for name, value, allowed in (
            ("placement", self.placement, PLACES.get(key, ())),
            ("reads", self.reads, READ_AT.get(key, ())),
        ):
            if value not in ("default", *allowed):
                choice = ", ".join(("default", *allowed))
                raise ValueError(f"{point}: {name} can be {choice} there, got {value!r}")
        plain = self.layer_norm == "none" and self.activation == "relu"
        if (self.form, self.target) == ("bottleneck", "heads") and not plain:
            raise ValueError(
                f"{point} is ReLU without a LayerNorm: got activation {self.activation!r},"
                f" layer_norm {self.layer_norm!r}"
            )
        if not self.residual and self.insertion != "sequential":
            raise ValueError(f"{point}: residual=False is for sequential insertion")
        if not self.residual and self.placement == "around_norm":
            raise ValueError(f"{point}: 'around_norm' adds to the sum in front of the norm:"
                             " residual=False is for the other placements")  # fmt: skip

    def _nearest(self) -> str:
        """The point of the grid that differs in the fewest dimensions, form the last to change."""

        def distance(other: tuple) -> int:
            insertion, form, target, composition = other
            family = target.split(".")[0] == self.target.split(".")[0]
            return (
                8 * (form != self.form) + 3 * (target != self.target) - family
                + 2 * (insertion != self.insertion) + (composition != self.composition)
            )  # fmt: skip

        points = (
            (insertion, form, target, composition)
            for (form, target), insertions in GRID.items()
            for insertion, compositions in insertions.items()
            for composition in compositions
        )
        return _described(*min(points, key=distance))

    def _check_numbers(self) -> None:
        if self.reads == "query" and self.dropout:
            raise ValueError(
                "a bottleneck that reads the query is a part of the attention, which drops with the"
                f" model's own probability: dropout must be 0, got {self.dropout}, or reads 'input'"
            )
        if self.form not in ("full", "bias") and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"size (rank, bottleneck or prefix length) must be an integer >= 1,"
                             f" got {self.size!r}")  # fmt: skip
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not isinstance(self.mlp_dim, int) or self.mlp_dim < 1:
            raise ValueError(f"mlp_dim must be an integer >= 1, got {self.mlp_dim!r}")

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if self.form in _OF_NO_LAYER:
            raise ValueError(f"layers is for what stands in layers: a {self.form} does not")
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else ()
        whole = all(type(layer) is int and layer >= 0 for layer in layers)
        if not layers or not whole or len(set(layers)) < len(layers):
            raise ValueError(
                f"layers must be None or different integers >= 0, at least one, got {self.layers!r}"
            )
        object.__setattr__(self, "layers", tuple(sorted(layers)))

    def _check_names(self) -> None:
        if self.target == MODULES:
            modules = ALL_LINEAR if self.modules is None else self.modules
            object.__setattr__(self, "modules", checked_modules(modules))
            if set(self.where) != set(KINDS):
                raise ValueError("where is for targets of the paper: a name says where a module is")
        elif self.modules is not None:
            raise ValueError(f"modules is for the target {MODULES!r}, got it on {self.target!r}")
        for name in ("patterns", "rslora"):
            if getattr(self, name) and self.form != "low_rank":
                raise ValueError(f"{name} is for low_rank, got it on {self.form}")
        object.__setattr__(self, "patterns", checked_patterns(self.patterns))

    def meets(self, other: "Modification") -> bool:
        """Whether at least one layer has both, if they are on the same place."""
        if self.layers is None or other.layers is None:
            return True
        return not set(self.layers).isdisjoint(other.layers)


def _described(insertion: str, form: str, target: str, composition: str) -> str:
    return f"{insertion} {form} on {target}, composition {composition!r}"


def _one_of(name: str, value: object, options: tuple[object, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(str, options))}; got {value!r}")


def _check_together(m: Modification, other: Modification) -> None:
    """ValueError if two modifications are on one place that can have only one of them."""
    kinds = [kind for kind in m.where if kind in other.where]
    if not kinds or not m.meets(other):
        return
    if (m.form, m.target) == (other.form, other.target) and m.target != MODULES:
        raise ValueError(f"two {m.form} modifications of {m.target} in {kinds[0]!r}")
    on_heads = {n.form for n in (m, other) if n.target == "heads"}
    if on_heads == {"prefix", "bottleneck"} and "query" in (m.reads, other.reads):
        raise ValueError(
            f"a prefix and a bottleneck that reads the query in {kinds[0]!r}: one attention carries"
            " one of them"
        )


@dataclass(frozen=True)
class PeltConfig:
    """A method: the modifications that are made to one model.

    Args:
        name: its name, in messages and saved files.
        modifications: what is changed. Two of them on one target must go together.
        train_head: whether the task head trains, too.
        dtype: of the trained tensors: "float32" (beside a bf16 base, too), "bfloat16", "float16" or
            "float64". It is raised to the base's own precision where that is higher.

    Raises:
        TypeError: a field has another type.
        ValueError: the modifications cannot be together; the message says which.

    Example:
        lora = Modification("low_rank", "attention.q", size=8, composition="scaled", scale=2.0)
        pelt_fast.inject(model, PeltConfig("my_lora", (lora,)))
    """

    name: str = field(compare=False)  # MAM is MAM, whatever it is called
    modifications: tuple[Modification, ...] = field(default=())
    train_head: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "modifications", tuple(self.modifications))
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__}")
        _one_of("train_head", self.train_head, (True, False))
        _one_of("dtype", self.dtype, ("float32", "bfloat16", "float16", "float64"))
        for modification in self.modifications:
            if not isinstance(modification, Modification):
                raise TypeError(
                    f"modifications must hold Modification, got {type(modification).__name__}"
                )
        if self.is_full and len(self.modifications) > 1:
            raise ValueError("full fine-tuning already trains every weight: it stands alone")
        for i, m in enumerate(self.modifications):
            for other in self.modifications[:i]:
                _check_together(m, other)

    @property
    def is_full(self) -> bool:
        """Whether this is full fine-tuning."""
        return any(m.form == "full" for m in self.modifications)

    def __add__(self, other: "PeltConfig") -> "PeltConfig":
        """Both methods in one. Raises ValueError where they cannot be together."""
        if not isinstance(other, PeltConfig):
            return NotImplemented
        for name in ("train_head", "dtype"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"{name} differs: {self.name!r} has {mine}, {other.name!r} {its}")
        both = self.modifications + other.modifications
        return PeltConfig(f"{self.name}+{other.name}", both, self.train_head, self.dtype)

    def replace(self, **changes: Any) -> "PeltConfig":
        """A copy with the given Modification fields changed in every modification; raises what
        Modification raises, and TypeError for an unknown field."""
        modifications = [dataclasses.replace(m, **changes) for m in self.modifications]
        return dataclasses.replace(self, modifications=tuple(modifications))

    def as_dict(self) -> dict:
        """The config as plain data. ``layers``, ``modules``, ``patterns`` and ``rslora`` are left
        out if they are empty, as in files from before these fields existed."""
        raw = dataclasses.asdict(self)
        for m in raw["modifications"]:
            for name in ("layers", "modules", "patterns", "rslora"):
                if not m[name]:
                    del m[name]
        return raw

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "PeltConfig":
        """The inverse of :meth:`to_json`; raises ValueError that names an unknown field."""
        raw = json.loads(text)
        try:
            raw["modifications"] = [Modification(**m) for m in raw.get("modifications", [])]
            return cls(**raw)
        except TypeError as error:
            raise ValueError(f"not a pelt_fast config of this version: {error}") from None
