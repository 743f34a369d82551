"""The model sizes that benchmarks name, and models of these sizes.

Weights are random: no time, and no byte, depends on their values.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    """A model's sizes. ``kv_heads`` below ``heads`` is grouped-query attention; ``gated`` an FFN
    of three projections; ``layers`` are those of each stack."""

    name: str
    family: str
    width: int
    inner: int
    heads: int
    head_dim: int
    layers: int
    vocabulary: int
    kv_heads: int | None = None
    gated: bool = False
    activation: str = "gelu"
    bias: bool = True
    dropout: float = 0.1

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def causal(self) -> bool:
        """Whether its self-attention looks back only: a decoder alone."""
        return self.family in ("llama", "qwen3")


def _decoder(name, family, width, inner, layers, vocabulary) -> Shape:
    return Shape(name, family, width, inner, 32, 128, layers, vocabulary, kv_heads=8, gated=True,
                 activation="silu", bias=False, dropout=0.0)  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("bart-768", "bart", 768, 3072, 12, 64, 2, 50265),
        Shape(
            "llama-768",
            "llama",
            768,
            2048,
            12,
            64,
            2,
            32000,
            kv_heads=4,
            gated=True,
            activation="silu",
            bias=False,
            dropout=0.0,
        ),
        Shape("roberta-base", "roberta", 768, 3072, 12, 64, 12, 50265),
        Shape("roberta-large", "roberta", 1024, 4096, 16, 64, 24, 50265),
        Shape("bart-large", "bart", 1024, 4096, 16, 64, 12, 50265),
        Shape("mbart-large", "mbart", 1024, 4096, 16, 64, 12, 250027),
        Shape("t5-base", "t5", 768, 3072, 12, 64, 12, 32128, activation="relu", bias=False),
        Shape("t5-large", "t5", 1024, 4096, 16, 64, 24, 32128, activation="relu", bias=False),
        _decoder("llama-3-8b", "llama", 4096, 14336, 32, 128256),
        _decoder("qwen3-8b", "qwen3", 4096, 12288, 36, 151936),
    )
}


def shape(name: str) -> Shape:
    """The shape called ``name``; ValueError lists those there are."""
    if name not in SHAPES:
        raise ValueError(f"unknown model {name!r}: choose {', '.join(SHAPES)}")
    return SHAPES[name]


def shrunk(name: str, layers: int | None = None, width: int | None = None) -> Shape:
    """A named shape with fewer layers or, every other size in proportion, narrower."""
    found = shape(name)
    if layers is not None:
        found = replace(found, layers=layers)
    if width is not None:
        heads = min(found.heads, width // 8)
        groups = max(1, heads * found.groups // found.heads)
        found = replace(
            found, width=width, inner=found.inner * width // found.width, heads=heads,
            kv_heads=None if found.kv_heads is None else groups, head_dim=width // heads,
            vocabulary=min(found.vocabulary, 1000),
        )  # fmt: skip
    return found


def build(shape: Shape, longest: int = 1024) -> torch.nn.Module:
    """A transformers model of a shape, random weights, that takes rows of ``longest`` tokens.

    Encoders carry a classifier of 3 classes, the others the language-modelling head. ValueError for
    a family without a row in pelt_fast's table.
    """
    import transformers as hf

    s, dropout = shape, shape.dropout
    shared = dict(vocab_size=s.vocabulary, pad_token_id=1)
    if s.family in ("bart", "mbart"):
        config, model = (
            (hf.BartConfig, hf.BartForConditionalGeneration) if s.family == "bart"
            else (hf.MBartConfig, hf.MBartForConditionalGeneration)
        )  # fmt: skip
        return model(config(
            d_model=s.width, encoder_layers=s.layers, decoder_layers=s.layers,
            encoder_attention_heads=s.heads, decoder_attention_heads=s.heads,
            encoder_ffn_dim=s.inner, decoder_ffn_dim=s.inner, dropout=dropout,
            max_position_embeddings=longest, **shared,
        ))  # fmt: skip
    if s.family == "roberta":
        return hf.RobertaForSequenceClassification(hf.RobertaConfig(
            hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=s.heads,
            intermediate_size=s.inner, max_position_embeddings=longest + 2, num_labels=3,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **shared,
        ))  # fmt: skip
    if s.family == "t5":
        return hf.T5ForConditionalGeneration(hf.T5Config(
            d_model=s.width, d_kv=s.head_dim, d_ff=s.inner, num_layers=s.layers,
            num_heads=s.heads, dropout_rate=dropout, decoder_start_token_id=0, **shared,
        ))  # fmt: skip
    if s.family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(
            hidden_size=s.width, intermediate_size=s.inner, num_hidden_layers=s.layers,
            num_attention_heads=s.heads, num_key_value_heads=s.groups, head_dim=s.head_dim,
            max_position_embeddings=longest, **shared,
        ))  # fmt: skip
    raise ValueError(f"{s.name} is a shape for layers: pelt_fast has no row for {s.family} yet")
