"""docs/architectures.md, made from the newest committed result."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import newest, newest_path, table

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
PART = "architectures"
HEAD = """# Architectures

Every text, vision and speech family of transformers whose config class builds a model offline,
under the methods: a tiny model with random weights, inject, forward, backward, eject. **yes** means
that output and every gradient are those of plain torch hooks on a copy of the base, that training
mode gives finite gradients, and that the model after `eject` is the one from before, bit for bit. A
number is a refusal, made before anything was changed; its reason is below. "no result": the effect
on the tiny model is below rounding, or there was no time. **row** says that the architecture table
has the family; the layout of any other was discovered on the model itself.
[The grid](parity.md) has every preset on the families with a row, padded, in bf16, and generating.
A prompt is compared where its positions are relative; the grid has the learned ones.
A model for text with images or sound is run on text alone: its language model has the method.

The commands: `python -m benchmarks.architectures` measures, `python -m benchmarks.architectures
--page` writes this page.
"""
SHORT = {
    "lora": "LoRA", "lora_ffn": "LoRA, FFN", "houlsby": "Houlsby", "pfeiffer": "Pfeiffer",
    "parallel_adapter_attn": "parallel, attention", "scaled_parallel_adapter": "parallel, FFN",
    "multi_head_parallel_adapter": "multi-head", "prefix": "prefix", "mam": "MAM",
    "bitfit": "BitFit", "prompt": "prompt",
}  # fmt: skip


def write() -> str:
    """Write the page; return its name."""
    PAGE.write_text(text(newest(PART), newest_path(PART).name))
    return PAGE.name


def text(result: dict, file: str) -> str:
    """The page of one result."""
    versions = result["machine"]["versions"]
    entries = [entry for entry in result["entries"] if "not_built" not in entry]
    methods, reasons = result["methods"], Reasons()
    rows = [_row(entry, methods, reasons) for entry in entries]
    counts = ", ".join(f"{_holding(entries, m)} under {SHORT[m]}" for m in methods)
    header = ["family", "kind", "row", *(SHORT[method] for method in methods)]
    left_out = [f"- {e['family']}: {_plain(e['not_built'])}" for e in result["entries"]
                if "not_built" in e]  # fmt: skip
    return "\n".join([
        HEAD,
        f"{len(entries)} families: {counts}. transformers {versions['transformers']}, from"
        f" `benchmarks/results/{file}`.",
        "", table(header, rows), "", *reasons.listed(), "",
        f"## Not built\n\n{len(left_out)} families are not in the table: their tiny config or input"
        " is not known to the script, or they need a package that is not installed.\n",
        *left_out, "",
    ])  # fmt: skip


def _holding(entries: list[dict], method: str) -> int:
    return sum("holds" in entry["cells"].get(method, {}) for entry in entries)


def _row(entry: dict, methods: list[str], reasons: "Reasons") -> list[str]:
    cells = (entry["cells"][method] for method in methods)
    row = "yes" if entry["row"] else ""
    return [entry["family"], entry["modality"], row, *(_cell(cell, reasons) for cell in cells)]


def _cell(cell: dict, reasons: "Reasons") -> str:
    if "holds" in cell:
        return "yes"
    if "unfinished" in cell:
        return "no result"
    return "**WRONG**" if "wrong" in cell else str(reasons.number(_plain(cell["refused"])))


def _plain(reason: str) -> str:
    """A reason in one line that Markdown leaves alone."""
    return " ".join(reason.split()).replace("|", "/").replace("<", "(").replace(">", ")")


class Reasons:
    """The reasons for refusals, each with a number. The first word of one, where it names the
    model or a layer, is left out, so that one reason has one number."""

    def __init__(self):
        self._numbers: dict[str, int] = {}

    def number(self, reason: str) -> int:
        """The number of a reason."""
        first, _, rest = reason.partition(" ")
        named = "For" in first or first.endswith((":", "Model", "Attention", "LMHeadModel"))
        reason = rest[:1].upper() + rest[1:] if named else reason
        return self._numbers.setdefault(reason, len(self._numbers) + 1)

    def listed(self) -> Iterator[str]:
        """A line for each reason."""
        return (f"{number}. {reason}" for reason, number in self._numbers.items())
