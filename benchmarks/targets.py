"""The numbers this project set itself, and what the newest committed results say of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import model
from .common import merged, newest
from .timing import quartiles, ratios

MODEL = "bart-768"


@dataclass(frozen=True)
class Target:
    """One line: what, the bound, what was found."""

    what: str
    bound: float
    value: float
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.value <= self.bound

    @property
    def wanted(self) -> str:
        """The bound as text."""
        return f"<= {self.bound:.2f}"

    @property
    def found(self) -> str:
        """The value as text, with its note."""
        return f"{self.value:.2f}{self.note and f' ({self.note})'}"


def all_targets() -> list[Target]:
    """Traffic, then the CPU's."""
    return [*_traffic(), *_cpu()]


def _traffic() -> Iterator[Target]:
    found = {(e["subject"], e["provider"]): e for e in newest("traffic")["entries"]}
    lora = "LoRA linear 4096 R=16 p="
    for p in ("0.0", "0.1"):
        for plan, bound in (("accumulate", 12), ("tail", 7)):
            passes = found[f"{lora}{p}", f"kernels, {plan}"]["both"]
            yield Target(f"passes of LoRA, {plan} plan, p={p}", bound, passes)
    for (subject, provider), entry in found.items():
        if subject.endswith("residual stream") and provider == "kernels":
            frozen = found[subject, "frozen"]
            beyond = entry["forward"] - frozen["forward"]
            yield Target(f"passes beyond the frozen layer, {subject}, forward", 2, beyond)
        if subject.startswith("prefix") and provider == "kernels":
            frozen = found[subject, "frozen"]
            for part, bound in (("forward", 4), ("backward", 6)):
                yield Target(
                    f"passes beyond the frozen layer, {subject}, {part}", bound,
                    entry[part] - frozen[part],
                    "workspace of the two-stage sums in it" if part == "backward" else "",
                )  # fmt: skip


def _cpu() -> Iterator[Target]:
    rows = {(r["method"], r["provider"]): r for r in model.rows(merged(f"model-{MODEL}"))
            if r["model"] == MODEL}  # fmt: skip
    mam, lora, peft = (
        rows[key] for key in (("mam", "pelt_fast"), ("lora_qv_ffn", "pelt_fast"),
                              ("lora_qv_ffn", "PEFT"))
    )  # fmt: skip
    frozen = rows["lora_qv_ffn", "frozen"]
    yield Target(f"{MODEL}, a MAM step / full fine-tuning", 0.85, mam["to_full"][1])
    share = mam["flops_to_frozen"]
    yield Target(f"{MODEL}, a MAM step / frozen x MAM's flops", 1.15, mam["to_frozen"][1] / share,
                 f"flops {share:.2f} x frozen")  # fmt: skip
    to_peft = quartiles(ratios(lora["seconds"], peft["seconds"]))[1]
    floor = quartiles(ratios(frozen["seconds"], peft["seconds"]))[1]
    yield Target(f"{MODEL}, a LoRA step (q, v, fc1, fc2) / PEFT", 0.80, to_peft,
                 f"the frozen model itself: {floor:.2f}")  # fmt: skip
