"""Methods in the field's words: ``prefix(30) + parallel_adapter(r=512, scale=4)`` is MAM.

Each function returns a :class:`PeltConfig`, and ``+`` puts two together. The defaults are the
paper's settings (Table 8, appendix A), so that each preset is one of these expressions.
"""

from collections.abc import Iterable
from typing import Any

from pelt_fast.config import KINDS, Modification, PeltConfig
from pelt_fast.config.named_modules import alpha_over, patterns_of, targets_of
from pelt_fast.config.word_values import flag, kinds_of, listed, scaled, sublayers, whole


def lora(
    r: int = 16,
    alpha: float = 32,
    *,
    targets: str | Iterable[str] = ("q", "v"),
    dropout: float = 0.1,
    rslora: bool = False,
    init: str = "lora",
    layers: str | Iterable[int] | None = None,
    where: str | Iterable[str] = KINDS,
    patterns: dict[str, dict[str, Any]] | None = None,
) -> PeltConfig:
    """LoRA: ``W x + (alpha / r) B A x`` on each target (paper equation 6).

    Args:
        r: the rank.
        alpha: the update is multiplied by alpha / r, which is what the config keeps as ``scale``.
        targets: the projections, a list or one text with commas: "q", "k", "v" and "o" of the
            attentions, "ffn.in" and "ffn.out". Or linear layers of any model by name, as PEFT's
            target_modules: "all-linear" (all but the task head and the output layer), endings of
            names (["q_proj", "v_proj"]), or a regular expression that a whole name must match.
        dropout: the probability on the input of the branch, in [0, 1).
        rslora: whether alpha is divided by the square root of r (rank-stabilised LoRA).
        init: "lora" (Kaiming down, zero up) or "bert" (normal 0.02).
        layers: the layers of each stack that have it, from 0, a list or one text, as "0,8-15"; None
            is all of them. By name: the first number in a module's name.
        where: which attentions and stacks: "encoder", "decoder", "cross", a list or one text with
            commas. Not for names.
        patterns: other ranks and alphas, as PEFT's rank_pattern and alpha_pattern:
            {"layers.0.*.q_proj": dict(r=64, alpha=64)}. A key is a regular expression that a
            module's name, or an ending of it, must match. What one leaves out, r or alpha, is that
            of the other modules.

    Returns:
        A config with one modification for each target; names are one target together.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument has another value; the message names it.

    Example:
        >>> lora(r=8, alpha=16, targets="q,v").modifications[0].scale
        2.0
        >>> lora(targets="all-linear").modifications[0].modules
        'all-linear'
    """
    scale = alpha_over(r, alpha, flag("rslora", rslora))
    details = dict(size=whole("r", r), rslora=rslora, init=init, dropout=dropout,
                   layers=listed(layers), where=kinds_of(where))  # fmt: skip
    details["patterns"] = patterns_of(patterns, r, alpha, rslora)
    found = tuple(
        Modification("low_rank", **target, **scaled(scale), **details)
        for target in targets_of(targets)
    )
    return PeltConfig("lora", found)


def adapter(
    r: int = 200,
    *,
    after: str = "attention+ffn",
    activation: str = "relu",
    dropout: float = 0.1,
    layer_norm: str | None = None,
    placement: str = "default",
    init: str = "bert",
    layers: str | Iterable[int] | None = None,
    where: str | Iterable[str] = KINDS,
) -> PeltConfig:
    """Sequential adapters: ``h + f(h D) U`` on the output of a sub-layer (Houlsby, Pfeiffer).

    Args:
        r: the bottleneck.
        after: "attention", "ffn", or both with a plus sign.
        activation: f: "identity", "relu", "gelu", "gelu_tanh", "silu" or "tanh".
        dropout: the probability on the bottleneck, in [0, 1).
        layer_norm: "none", "in" or "out". None is what the paper's code has: "in" after an
            attention, "none" after an FFN.
        placement: of an adapter after the FFN: "after_dropout" (default), "after_norm" or
            "around_norm" (Pfeiffer's).
        init: "bert" (normal 0.02) or "lora" (Kaiming down, zero up).
        layers: as for :func:`lora`.
        where: as for :func:`lora`.

    Returns:
        A config with one modification for each sub-layer.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument has another value; the message names it.

    Example:
        >>> [m.target for m in adapter(r=64).modifications]
        ['attention', 'ffn']
    """
    shared = dict(size=whole("r", r), activation=activation, dropout=dropout, init=init,
                  layers=listed(layers), where=kinds_of(where))  # fmt: skip
    found = []
    for target in sublayers("after", after):
        details = dict(layer_norm=_norm(layer_norm, target))
        if target == "ffn" or placement != "default":
            details["placement"] = placement
        found.append(Modification("bottleneck", target, "sequential", **shared, **details))
    return PeltConfig("adapter", tuple(found))


def parallel_adapter(
    r: int = 512,
    *,
    scale: float | str = 1.0,
    beside: str = "ffn",
    activation: str = "relu",
    dropout: float = 0.1,
    layer_norm: str | None = None,
    init: str = "lora",
    layers: str | Iterable[int] | None = None,
    where: str | Iterable[str] = KINDS,
) -> PeltConfig:
    """Parallel adapters: ``F(x) + s f(x D) U`` beside a sub-layer F (paper section 3.3).

    Args:
        r: the bottleneck.
        scale: s; "learned" (a scalar) or "learned_channel" (one for each channel) trains it.
        beside: "ffn", "attention", or both with a plus sign.
        activation: as for :func:`adapter`.
        dropout: as for :func:`adapter`.
        layer_norm: as for :func:`adapter`.
        init: "lora" (Kaiming down, zero up) or "bert" (normal 0.02).
        layers: as for :func:`lora`.
        where: as for :func:`lora`.

    Returns:
        A config with one modification for each sub-layer.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument has another value; the message names it.

    Example:
        >>> (prefix(30) + parallel_adapter(r=512, scale=4)).modifications[1].scale
        4.0
    """
    details = dict(size=whole("r", r), activation=activation, dropout=dropout, init=init,
                   layers=listed(layers), where=kinds_of(where))  # fmt: skip
    found = tuple(
        Modification("bottleneck", target, "parallel", **scaled(scale), **details,
                     layer_norm=_norm(layer_norm, target))
        for target in sublayers("beside", beside)
    )  # fmt: skip
    return PeltConfig("parallel_adapter", found)


def multi_head_adapter(
    r: int = 200,
    *,
    scale: float = 1.0,
    reads: str = "query",
    init: str = "bert",
    layers: str | Iterable[int] | None = None,
    where: str | Iterable[str] = KINDS,
) -> PeltConfig:
    """A ReLU adapter for each head of an attention, beside what it attends to (Table 1).

    Args:
        r: the bottleneck of all heads together.
        scale: s.
        reads: "query" (the frozen query projection is used again: the paper's code) or "input"
            (the attention's input, with a down projection of its own).
        init: "bert" (normal 0.02) or "lora" (Kaiming down, zero up).
        layers: as for :func:`lora`.
        where: as for :func:`lora`.

    Returns:
        A config with one modification.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument has another value; the message names it.

    Example:
        >>> multi_head_adapter(r=30).modifications[0].target
        'heads'
    """
    found = Modification(
        "bottleneck", "heads", **scaled(scale), size=whole("r", r), init=init, reads=reads,
        layers=listed(layers), where=kinds_of(where),
    )  # fmt: skip
    return PeltConfig("multi_head_adapter", (found,))


def prefix(
    length: int = 200,
    *,
    gated: bool = True,
    mlp: bool = True,
    mlp_dim: int = 800,
    layers: str | Iterable[int] | None = None,
    where: str | Iterable[str] = KINDS,
) -> PeltConfig:
    """Prefix tuning: trainable keys and values in front of every attention's (paper equation 7).

    Args:
        length: how many there are.
        gated: whether one softmax runs over both (prefix tuning); False adds the prefix's own.
        mlp: whether an MLP makes the prefix while it trains.
        mlp_dim: the hidden width of that MLP.
        layers: as for :func:`lora`.
        where: as for :func:`lora`.

    Returns:
        A config with one modification.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument has another value; the message names it.

    Example:
        >>> prefix(30, mlp=False).modifications[0].reparameterization
        'none'
    """
    found = Modification(
        "prefix", "heads", composition="gated" if flag("gated", gated) else "add",
        size=whole("length", length), mlp_dim=mlp_dim,
        reparameterization="mlp" if flag("mlp", mlp) else "none", layers=listed(layers),
        where=kinds_of(where),
    )  # fmt: skip
    return PeltConfig("prefix", (found,))


def prompt(length: int = 200) -> PeltConfig:
    """Prompt tuning: trainable vectors in front of the input embeddings (Lester et al.).

    Args:
        length: how many there are.

    Returns:
        A config with one modification.

    Raises:
        ValueError: ``length`` is no integer >= 1.

    Example:
        >>> prompt(20).modifications[0].size
        20
    """
    found = Modification("prompt", "embeddings", composition="gated", size=whole("length", length))
    return PeltConfig("prompt", (found,))


def bitfit() -> PeltConfig:
    """BitFit: the model's own biases train (Ben Zaken et al.).

    Returns:
        A config with one modification.

    Example:
        >>> bitfit().modifications[0].form
        'bias'
    """
    return PeltConfig("bitfit", (Modification("bias", "model"),))


def _norm(layer_norm: str | None, target: str) -> str:
    """What the paper's code has where nothing is said."""
    if layer_norm is None:
        return "in" if target == "attention" else "none"
    return layer_norm
