"""The targets of this project, and whether the newest committed results meet them."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import cpu, layer, model
from .common import merged, newest
from .timing import quartiles, ratios

MODEL = "bart-768"


@dataclass(frozen=True)
class Target:
    """One line: the quantity, its bound, the measured value."""

    what: str
    bound: float
    value: float
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is met."""
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
    """Traffic, then the CPU's: whole steps, then layers."""
    return [*_traffic(), *_cpu(), *_layers()]


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


def _layers() -> Iterator[Target]:
    """Times of forward + backward; an adapter counts as its additional time on its projection."""
    rows = [r for r in layer.rows(merged(cpu.PART)) if r["mode"] == layer.MODES[-1]]
    found = {(r["method"], r["p"], r["dtype"], r["provider"]): r for r in rows}
    for p, bound in ((0.0, 1.12), (0.1, 1.20)):
        ours, peft = (found["lora", p, "float32", name] for name in ("pelt_fast", "PEFT"))
        yield Target(f"CPU, LoRA linear fp32 p={p} / frozen", bound, ours["ratio"][1],
                     f"PEFT {peft['ratio'][1]:.2f}")  # fmt: skip
    for p in (0.0, 0.1):
        ours, peft, frozen = (
            found["lora", p, "bfloat16", name] for name in ("pelt_fast", "PEFT", "frozen")
        )
        to_peft = quartiles(ratios(ours["seconds"], peft["seconds"]))[1]
        floor = quartiles(ratios(frozen["seconds"], peft["seconds"]))[1]
        yield Target(f"CPU, LoRA linear bf16 p={p} / PEFT", 1 / 1.5, to_peft,
                     f"the frozen layer itself: {floor:.2f}")  # fmt: skip
    for name in ("sequential", "parallel"):
        ours, plain, frozen = (
            found[name, 0.1, "float32", who]["seconds"]
            for who in ("pelt_fast", "plain PyTorch", "frozen")
        )
        added = [(a - c) / (b - c) for a, b, c in zip(ours, plain, frozen)]
        yield Target(f"CPU, {name} adapter R=64 / plain PyTorch's", 1 / 1.5, quartiles(added)[1])
    for name in ("prefix", "prefix-causal"):
        ours, other = (
            found[name, 0.0, "float32", who] for who in ("pelt_fast", "concatenation + SDPA")
        )
        yield Target(f"CPU, {name} attention P=30 / frozen", 1.20, ours["ratio"][1],
                     f"concatenation {other['ratio'][1]:.2f}")  # fmt: skip
