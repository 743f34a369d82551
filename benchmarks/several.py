"""Several methods in one batch: a training step and a forward, compared with one method alone.

    pelt-fast bench model --method lora mam --several 4 32

BART of 2 + 2 layers of 768, 16 rows, no dropout. A step is zero_grad, forward and backward. The
floor is the step of one method of the same sizes on the whole batch (``inject``). Beside it: that
method among the others, all rows under it; the rows spread over the methods, neighbours together
and in turn; one step for each method on its share of the rows; and PEFT's mixed batch of LoRA,
which runs forward alone. The steps take turns.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import pelt_fast
from pelt_fast import PeltConfig
from pelt_fast.words import changed

from .common import check_names, table
from .model import methods
from .record import Record
from .timing import rounds

ALONE = "one method alone"
FORWARD = "forward: "
Step = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run."""

    methods: tuple[str, ...] = ("lora", "mam")
    counts: tuple[int, ...] = (4, 32)
    models: tuple[str, ...] = ("bart-768",)
    rows: int = 16
    tokens: int = 64
    layers: int = 2
    repeats: int = 9
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def wanted(plan: Plan) -> list[str]:
    """The methods. ValueError for a name that does not exist, or a plan that has no meaning."""
    check_names("method", plan.methods, methods())
    for count in plan.counts:
        if count < 2:
            raise ValueError(f"--several must be at least 2, got {count}")
    if plan.models != ("bart-768",):
        raise ValueError(f"--several runs on bart-768 alone, got {', '.join(plan.models)}")
    return list(plan.methods)


def run(plan: Plan, record: Record, progress: bool = True) -> list[dict]:
    """Measure everything; returns the entries."""
    for name in wanted(plan):
        if not record.in_time:
            record.leave(name)
            continue
        steps = steps_of(plan, changed(methods()[name], {"dropout": 0.0}))
        for provider, seconds in rounds(
            steps, plan.repeats, device=torch.device(plan.device)
        ).items():
            record.add(method=name, provider=provider, seconds=seconds, rows=plan.rows)
    record.finish()
    return record.entries


def steps_of(plan: Plan, config: PeltConfig) -> dict[str, Step]:
    """The steps that take turns."""
    base = _base(plan)
    batch = _batch(plan)
    alone = pelt_fast.inject(copy.deepcopy(base), config)
    steps = {ALONE: _training(alone, batch, None)}
    forwards = {FORWARD + ALONE: _forward(alone, batch, None)}
    for count in plan.counts:
        names = [f"method{i}" for i in range(count)]
        model = pelt_fast.inject_named(
            copy.deepcopy(base), dict.fromkeys(names, config), together=True
        )
        together, in_turn = _routes(names, plan.rows)
        steps[f"{count} together, all rows under one"] = _training(model, batch, names[0])
        steps[f"{count}, neighbours together"] = _training(model, batch, together)
        steps[f"{count}, in turn"] = _training(model, batch, in_turn)
        forwards[f"{FORWARD}{count}, in turn"] = _forward(model, batch, in_turn)
        if count <= plan.rows:
            part = {key: value[: plan.rows // count] for key, value in batch.items()}
            steps[f"{count} steps, one for each method"] = _in_parts(alone, part, count)
            if config.name == "lora":
                peer = _peft(base, config, names)
                forwards[f"{FORWARD}{count}, PEFT's mixed batch"] = _peft_forward(
                    peer, batch, in_turn
                )
    return steps | forwards


def _base(plan: Plan) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(d_model=768, encoder_attention_heads=12, decoder_attention_heads=12,
                 encoder_ffn_dim=3072, decoder_ffn_dim=3072, vocab_size=2000)  # fmt: skip
    dropouts = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    layers = dict(encoder_layers=plan.layers, decoder_layers=plan.layers)
    model = BartForConditionalGeneration(BartConfig(**sizes, **dropouts, **layers))
    return model.to(plan.device, plan.dtype).requires_grad_(False).train()


def _batch(plan: Plan) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 2000, (plan.rows, plan.tokens), device=plan.device)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def _routes(names: list[str], rows: int) -> tuple[list[str], list[str]]:
    """The methods spread over the rows: neighbours under one method, and in turn."""
    used = names[:: max(len(names) // rows, 1)][:rows]
    in_turn = [used[i % len(used)] for i in range(rows)]
    return sorted(in_turn, key=used.index), in_turn


def _training(model: nn.Module, batch: dict, routes) -> Step:
    def step(_: int) -> None:
        model.zero_grad()
        if routes is None:
            model(**batch).loss.backward()
            return
        with pelt_fast.route(model, routes):
            model(**batch).loss.backward()

    return step


def _in_parts(model: nn.Module, part: dict, count: int) -> Step:
    one = _training(model, part, None)
    return lambda i: [one(i) for _ in range(count)]


@torch.no_grad()
def _forward(model: nn.Module, batch: dict, routes) -> Step:
    @torch.no_grad()
    def step(_: int) -> None:
        if routes is None:
            model(**batch)
            return
        with pelt_fast.route(model, routes):
            model(**batch)

    return step


def _peft(base: nn.Module, config: PeltConfig, names: list[str]) -> nn.Module:
    """PEFT's model with the same LoRA under each name."""
    from peft import LoraConfig, get_peft_model

    one = config.modifications[0]
    lora = LoraConfig(r=one.size, lora_alpha=one.size * one.scale, lora_dropout=0.0,
                      target_modules=["q_proj", "v_proj"])  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    return model.eval()


def _peft_forward(model: nn.Module, batch: dict, names: list[str]) -> Step:
    @torch.no_grad()
    def step(_: int) -> None:
        model(**batch, adapter_names=names)

    return step


def report(entries: list[dict]) -> str:
    """The table."""
    header = ["method", f"{entries[0]['rows']} rows", "ms", "ratio to one method alone"]
    rows = [
        [row["method"], row["provider"], f"{1e3 * row['median']:.0f}", f"{row['ratio']:.3f}"]
        for row in ratios(entries)
    ]
    return table(header, rows)


def curves(entries: list[dict]) -> dict[str, dict[str, float]]:
    """A training step's ratio by the number of methods: a curve for each method and kind of
    step."""
    found: dict[str, dict[str, float]] = {}
    for row in ratios(entries):
        match = re.fullmatch(r"(\d+),? (.*)", row["provider"])
        if match:
            found.setdefault(f"{row['method']}: {match[2]}", {"1": 1.0})[match[1]] = row["ratio"]
    return found


def ratios(entries: list[dict]) -> list[dict]:
    """The entries with their medians, and the ratio to one method alone, round by round."""
    floors = {(e["method"], e["provider"]): e["seconds"] for e in entries}
    found = []
    for entry in entries:
        forward = entry["provider"].startswith(FORWARD)
        floor = floors[entry["method"], FORWARD + ALONE if forward else ALONE]
        each = [a / b for a, b in zip(entry["seconds"], floor, strict=True)]
        found.append(entry | dict(median=median(entry["seconds"]), ratio=median(each)))
    return found
