"""Arguments that go together, each group under one name.

A bundle is a ``NamedTuple``: frozen, and ``*bundle`` is its flat form. The functions of an op take
bundles. ``torch.library`` has no groups, so the schema is made from the fields of the bundles
(:func:`flat_fields`), and :func:`from_flat` makes the bundles again. A new argument is one edit.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_type_hints

from torch import Tensor

LAYER_NORM_EPS = 1e-5  # of an adapter's LayerNorm


class FrozenLinear(NamedTuple):
    """A frozen linear layer: weight (N, K), bias (N) or None."""

    weight: Tensor
    bias: Tensor | None


class LowRank(NamedTuple):
    """The factors of LoRA: lora_a (R, K), lora_b (N, R), and the scale s of their product."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float


class Dropout(NamedTuple):
    """A dropout: its probability and its seed, None if it does not act."""

    dropout_p: float
    seed: Tensor | None


class Bottleneck(NamedTuple):
    """The weights of an adapter: D (R, K), d (R) or None, U (N, R), u (N) or None."""

    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None


class Down(NamedTuple):
    """The first half of a low-rank update: D (R, K), d (R) or None."""

    down_weight: Tensor
    down_bias: Tensor | None


class Up(NamedTuple):
    """The second half of a low-rank update: U (N, R), u (N) or None."""

    up_weight: Tensor
    up_bias: Tensor | None


class AdapterNorm(NamedTuple):
    """The LayerNorm of an adapter: of its input ("in"), of its update ("out") or "none"."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    layer_norm: str


class Transform(NamedTuple):
    """What happens between the two matrices of a bottleneck, and the scale of the update."""

    activation: str
    scale: float
    dropout_p: float
    seed: Tensor | None


class FrozenFFN(NamedTuple):
    """The frozen feed-forward block: W1, Wg (F, K), W2 (N, F); biases and Wg may be None."""

    in_weight: Tensor
    in_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None


class FFNMatrices(NamedTuple):
    """The matrices of a widened block. Backward reads these weights and no others."""

    in_weight: Tensor
    gate_weight: Tensor | None
    out_weight: Tensor
    down_weight: Tensor
    up_weight: Tensor


class Packed(NamedTuple):
    """The stacked weights: [gate; in; down; zeros] and [out | s up | zeros], either or None."""

    packed: Tensor | None
    packed_out: Tensor | None


class FFNSettings(NamedTuple):
    """The activations of block and bottleneck, the scale, and three dropouts with one seed row
    each: 0 bottleneck, 1 the block's activation, 2 the block's output."""

    ffn_activation: str
    activation: str
    scale: float
    dropout_p: float
    activation_dropout_p: float
    output_dropout_p: float
    seed: Tensor | None


class Segments(NamedTuple):
    """Which rows run which method. ``segments`` (S, 4) int64 on the activation's device: first row,
    rows, method (-1: none), first row among the method's own rows. Segments are disjoint, in any
    order. ``ranks``: R_g of each method, 0 for a method that has nothing here."""

    segments: Tensor
    ranks: Sequence[int]


class RoutedDown(NamedTuple):
    """The first halves of many methods: the D_g below each other (sum R_g, K), the d_g behind each
    other (sum R_g) or None."""

    down_weights: Tensor
    down_biases: Tensor | None


class RoutedUp(NamedTuple):
    """The second halves of many methods: the U_g (N, R_g), each flattened, behind each other
    (N sum R_g), and the u_g (G, N) or None."""

    up_weights: Tensor
    up_biases: Tensor | None


class RoutedDropout(NamedTuple):
    """The dropouts of many methods: p_g (empty: none acts) and the seeds (G, 2) int64."""

    probabilities: Sequence[float]
    seeds: Tensor | None


class RoutedTransform(NamedTuple):
    """What happens between the two halves of every method, and the scale of each update."""

    activation: str
    scales: Sequence[float]


class QKV(NamedTuple):
    """Queries (B, H, T, D), keys and values (B, Hkv, S, D)."""

    q: Tensor
    k: Tensor
    v: Tensor


class Prefix(NamedTuple):
    """Trainable keys and values (Hkv, P, D)."""

    prefix_k: Tensor
    prefix_v: Tensor


class RoutedPrefix(NamedTuple):
    """The trainable keys and values of several methods, and the method of each row of the batch.

    ``prefix_k`` and ``prefix_v`` are (Hkv, sum P, D): the methods' own behind each other, in order.
    ``routes`` (B) int64: the method of each row of q, -1 for none. ``lengths``: the P of each
    method, 0 if it has no prefix here.
    """

    prefix_k: Tensor
    prefix_v: Tensor
    routes: Tensor
    lengths: Sequence[int]


class Scores(NamedTuple):
    """How scores are made: the mask of the context, whether it is causal, and the scale."""

    attn_mask: Tensor | None
    is_causal: bool
    scale: float


class Form(NamedTuple):
    """The function of the prefix's scores, "softmax" or "relu", and how the two parts are
    combined: "gated" (prefix tuning) or "add"."""

    form: str
    composition: str


class AttentionOutput(NamedTuple):
    """The results of the forward pass: o (B, H, T, D), lse (B, H, T), the context's own output, and
    the dropout state of a library kernel."""

    o: Tensor
    lse: Tensor
    context_o: Tensor
    context_rng: Tensor


NOTHING = {kind: (None,) * len(kind._fields) for kind in (
    FrozenFFN, FFNSettings, Packed, Transform, Dropout, Scores, Form, Segments, RoutedDropout,
    RoutedTransform,
)}  # fmt: skip

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", str: "str",
    Sequence[bool]: "bool[]", Sequence[int]: "int[]", Sequence[float]: "float[]",
}  # fmt: skip


# the empty tensor that replaces a result of an op that was not requested
absent: Callable[[Tensor], Tensor] = functools.partial(Tensor.new_empty, size=(0,))


def _parameters(function: Callable) -> list[tuple[str, type]]:
    """The positional parameters of ``function``, with their types."""
    hints = get_type_hints(function)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, hints[p.name]) for p in parameters if p.kind in kinds]


def parameter_types(function: Callable) -> list[type]:
    """The types of the positional parameters of ``function``, without splitting bundles."""
    return [kind for _, kind in _parameters(function)]


def _is_bundle(kind: type) -> bool:
    return hasattr(kind, "_fields")


def flat_fields(function: Callable) -> dict[str, type]:
    """The arguments of ``function`` by name, each bundle replaced by its fields."""
    flat: dict[str, type] = {}
    for name, kind in _parameters(function):
        flat |= get_type_hints(kind) if _is_bundle(kind) else {name: kind}
    return flat


def schema_of(function: Callable) -> str:
    """The schema of an op whose specification is ``function``, which returns a tensor or a tuple of
    tensors."""
    arguments = ", ".join(f"{_SCHEMA_TYPES[t]} {name}" for name, t in flat_fields(function).items())
    found = get_type_hints(function)["return"]
    results = (found,) if found is Tensor else found.__args__
    return f"({arguments}) -> ({', '.join(_SCHEMA_TYPES[t] for t in results)})"


def unflatten(*kinds: type) -> Callable:
    """A function of flat values that returns them grouped: one item for each of ``kinds``."""
    return from_flat(None, kinds)


def from_flat(function: Callable | None, kinds: Sequence[type] | None = None) -> Callable:
    """A function of flat arguments that calls ``function`` with bundles.

    Args:
        function: the function to call; None returns the bundles themselves.
        kinds: the types of its arguments, bundles or others. By default they are read from the
            signature of ``function``, and the flat arguments then have its names.

    The call is generated as source, so that no loop runs in the op.
    """
    named = _parameters(function) if kinds is None else [(f"a{i}", k) for i, k in enumerate(kinds)]
    names, call, scope = [], [], {"function": function}
    for name, kind in named:
        if not _is_bundle(kind):
            names.append(name)
            call.append(name)
            continue
        fields = [f"{name}_{field}" if kinds is not None else field for field in kind._fields]
        scope[kind.__name__] = kind
        names += fields
        call.append(f"{kind.__name__}({', '.join(fields)})")
    called = "function" if function else ""
    source = f"def flat({', '.join(names)}):\n    return {called}({', '.join(call)})\n"
    exec(
        compile(source, f"<flat arguments of {getattr(function, '__name__', 'op')}>", "exec"), scope
    )
    return scope["flat"]
