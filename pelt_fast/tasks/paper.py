"""The results in the paper's tables: XSum ROUGE-1/2/L, WMT16 en-ro BLEU, dev accuracy.

A row of a table: its label, the method in this library's words, and the paper's numbers by task.
Sizes are for BART-large, mBART-large (d = 1024) and RoBERTa-base (d = 768).
"""

from dataclasses import dataclass

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.presets import methods

XSUM_WMT = ("xsum", "wmt16")
GLUE = ("sst2", "mnli")


@dataclass(frozen=True)
class Row:
    """One line of a table; ``paper`` has by task a score, the three ROUGE scores, or None."""

    label: str
    config: PeltConfig
    paper: dict


@dataclass(frozen=True)
class Table:
    """One table of the paper: its subject, tasks, the width its sizes are for, and its rows."""

    name: str
    title: str
    tasks: tuple[str, ...]
    width: int
    rows: tuple[Row, ...]


def _preset(name: str, **sizes) -> PeltConfig:
    """A preset; sizes by form, or by target ("attention", "ffn") where one form is on two."""
    config = methods()[name]
    changed = tuple(
        Modification(**{**m.__dict__, "size": sizes.get(m.form, sizes.get(m.target, m.size))})
        for m in config.modifications
    )
    return PeltConfig(config.name, changed)


def _adapter(target: str, insertion: str, size: int, scale: float = 1.0) -> PeltConfig:
    """As in the paper's code: with a LayerNorm in front on the attention, without on the FFN."""
    norm = "in" if target == "attention" or insertion == "sequential" else "none"
    one = Modification("bottleneck", target, insertion, "add" if scale == 1 else "scaled", size,
                       scale, dropout=0.1, init="bert" if scale == 1 else "lora",
                       layer_norm=norm)  # fmt: skip
    return PeltConfig(f"{insertion} {target}", (one,))


def _lora_ffn(size: int, scale: float) -> PeltConfig:
    config = _preset("lora_ffn", low_rank=size)
    return config.replace(scale=scale) if scale != 1 else config.replace(scale=1.0)


def _row(label: str, config: PeltConfig, xsum: tuple | None, bleu: float | None) -> Row:
    return Row(label, config, {"xsum": xsum, "wmt16": bleu})


def _glue(label: str, config: PeltConfig, sst2: float | None, mnli: float | None) -> Row:
    return Row(label, config, {"sst2": sst2, "mnli": mnli})


_TABLE2 = (
    _glue("full fine-tuning", _preset("full"), 94.6, 87.6),
    _glue("linear probe", _preset("linear_probe"), None, None),
    _glue("BitFit", _preset("bitfit"), 93.7, 84.7),
    _glue("prompt, l=50", _preset("prompt", prompt=50), None, None),
    _glue("prefix, l=32", _preset("prefix", prefix=32), 94.0, 86.3),
    _glue("LoRA (q, v), r=16", _preset("lora", low_rank=16), 94.2, 87.2),
    _glue("Houlsby, r=16", _preset("houlsby", bottleneck=16), None, None),
    _glue("Pfeiffer, r=32", _preset("pfeiffer", bottleneck=32), 94.2, 87.2),
    _glue("parallel adapter (ffn), r=32", _preset("parallel_adapter_ffn", bottleneck=32),
          None, None),
    _glue("scaled parallel adapter (ffn), r=32", _preset("scaled_parallel_adapter", bottleneck=32),
          None, None),
    _glue("MAM, l=16, r=16", _preset("mam_glue"), 94.2, 87.4),
)  # fmt: skip

_TABLE3 = (
    _row("prefix, l=200", _preset("prefix"), (43.40, 20.46, 35.51), 35.6),
    _row("SA (attn), r=200", _adapter("attention", "sequential", 200), (42.01, 19.30, 34.40), 35.3),
    _row("SA (ffn), r=200", _adapter("ffn", "sequential", 200), (43.21, 19.98, 35.08), 35.6),
    _row("PA (attn), r=200", _adapter("attention", "parallel", 200), (43.58, 20.31, 35.34), 35.6),
    _row("PA (ffn), r=200", _adapter("ffn", "parallel", 200), (43.93, 20.66, 35.63), 36.4),
)

_MULTI_HEAD = "multi_head_parallel_adapter"
_TABLE4 = (
    _row("PA (attn), r=200", _adapter("attention", "parallel", 200), None, 35.6),
    _row("prefix, l=200", _preset("prefix"), None, 35.6),
    _row("MH PA (attn), r=200", _preset(_MULTI_HEAD), None, 35.8),
    _row("prefix, l=30", _preset("prefix", prefix=30), None, 35.2),
    _row("prefix, l=30, no gate", _preset("prefix_ungated"), None, 34.9),
    _row("PA (ffn), r=30", _adapter("ffn", "parallel", 30), None, 33.0),
    _row("PA (attn), r=30", _adapter("attention", "parallel", 30), None, 33.7),
    _row("MH PA (attn), r=30", _preset(_MULTI_HEAD, bottleneck=30), None, 35.3),
)

_TABLE5 = (
    _row("LoRA (ffn), s=4", _lora_ffn(102, 4.0), (44.59, 21.31, 36.25), None),
    _row("LoRA (ffn), s=1", _lora_ffn(102, 1.0), (44.17, 20.83, 35.74), None),
    _row("PA (ffn), r=512", _adapter("ffn", "parallel", 512), (44.35, 20.98, 35.98), None),
    _row("scaled PA (ffn), s=4", _preset("scaled_parallel_adapter"), (44.85, 21.54, 36.58), None),
    _row("scaled PA (ffn), learned s", _preset("learned_scale_parallel_adapter"),
         (44.56, 21.31, 36.29), None),
)  # fmt: skip

_TABLE6 = (
    _row("full fine-tuning", _preset("full"), (44.81, 21.94, 36.83), 37.3),
    _row("BitFit", _preset("bitfit"), (40.64, 17.32, 32.19), 26.4),
    _row("prompt tuning", _preset("prompt"), (38.91, 15.98, 30.83), 21.0),
    _row("prefix, l=200", _preset("prefix"), (43.40, 20.46, 35.51), 35.6),
    _row("Pfeiffer, r=600", _preset("pfeiffer"), (44.03, 20.89, 35.89), 36.9),
    _row("LoRA (ffn), r=102", _preset("lora_ffn"), (44.53, 21.29, 36.28), 36.8),
    _row("PA (ffn), r=1024", _preset("parallel_adapter_ffn"), (44.71, 21.41, 36.41), 37.2),
    _row("PA (attn, 30) + PA (ffn, 512)", _preset("parallel_attn_parallel_ffn"),
         (44.29, 21.06, 36.12), 37.2),
    _row("prefix (attn, 30) + LoRA (ffn, 102)", _preset("prefix_lora_ffn"),
         (44.84, 21.71, 36.77), 37.0),
    _row("MAM, l=30, r=512", _preset("mam"), (45.06, 21.90, 36.87), 37.5),
)  # fmt: skip

# every bottleneck of figure 4 and table 12: ROUGE-2 and BLEU
_FIGURE4 = tuple(
    Row(label, config, {"xsum": xsum, "wmt16": bleu}) for label, config, xsum, bleu in (
        ("prefix, l=1", _preset("prefix", prefix=1), 18.14, 30.2),
        ("prefix, l=30", _preset("prefix", prefix=30), 20.01, 35.2),
        ("prefix, l=200", _preset("prefix"), 20.46, 35.6),
        ("prefix, l=512", _preset("prefix", prefix=512), 20.40, 35.1),
        ("LoRA (attn), r=1", _preset("lora", low_rank=1), 17.4, 25.5),
        ("LoRA (attn), r=30", _preset("lora", low_rank=30), 19.59, 34.2),
        ("LoRA (attn), r=200", _preset("lora", low_rank=200), 20.29, 36.2),
        ("LoRA (attn), r=400", _preset("lora", low_rank=400), 20.5, 36.6),
        ("SA (ffn), r=30", _adapter("ffn", "sequential", 30), 18.81, 33.0),
        ("SA (ffn), r=200", _adapter("ffn", "sequential", 200), 20.4, 35.6),
        ("SA (ffn), r=512", _adapter("ffn", "sequential", 512), 20.58, 36.3),
        ("SA (ffn), r=1024", _adapter("ffn", "sequential", 1024), 20.98, 36.7),
        ("PA (ffn), r=200", _adapter("ffn", "parallel", 200), 20.66, 36.4),
        ("PA (ffn), r=512", _adapter("ffn", "parallel", 512), 20.98, 37.1),
        ("PA (ffn), r=1024", _adapter("ffn", "parallel", 1024), 21.24, 37.3),
        ("prompt, l=1", _preset("prompt", prompt=1), 5.33, 6.0),
        ("prompt, l=30", _preset("prompt", prompt=30), 14.0, 16.7),
        ("prompt, l=200", _preset("prompt", prompt=200), 15.49, 21.0),
    )
)  # fmt: skip

TABLES = {
    table.name: table for table in (
        Table("table2", "Methods at half a per cent of the parameters", GLUE, 768, _TABLE2),
        Table("table3", "Sequential against parallel insertion", XSUM_WMT, 1024, _TABLE3),
        Table("table4", "Heads against whole attentions at tiny budgets", ("wmt16",), 1024,
              _TABLE4),
        Table("table5", "Composition", ("xsum",), 1024, _TABLE5),
        Table("table6", "The methods of the paper", XSUM_WMT, 1024, _TABLE6),
        Table("figure4", "Every bottleneck", XSUM_WMT, 1024, _FIGURE4),
    )
}  # fmt: skip
