"""Whole training steps of whole models: forward, backward, AdamW on the trained parameters.

One method after the other is compared with the frozen model (forward and backward to the
embeddings: the floor), full fine-tuning, and the peers' versions of the method; their steps take
turns in one run. Rows have the token lengths of real text (``text.py``); weights are random. Flops
are counted on the definition in plain PyTorch. Before a method is timed, logits and gradients of
the same model with one layer and dropout off are compared with fp64.
"""

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pelt_fast
from pelt_fast import Modification, PeltConfig
from pelt_fast.testing import ROUNDING_BAND

from . import peers, text, whole
from .common import cell, check_names, saved_bytes, table
from .graphs import graph_seconds
from .layer import free_bytes
from .memory import peak_growth, standing
from .peers.plain_ops import as_plain
from .problems import Absent, failure, why_not_timed
from .record import Record
from .shapes import Shape, build, shape
from .timing import quartiles, ratios, rounds
from .whole import Trained

FLOORS = ("frozen", "full fine-tuning")
QUICK_METHODS = ("mam", "lora_qv_ffn", "scaled_parallel_adapter", "prefix_nomlp")
EQUAL = ("lora", "lora_ffn", "parallel_adapter_attn", "scaled_parallel_adapter", "houlsby",
         "prefix_nomlp", "mam")  # fmt: skip
_TARGETS = ("attention.q", "attention.v", "ffn.in", "ffn.out")


def methods() -> dict[str, PeltConfig]:
    """The presets that change a model, and LoRA on q, v and both FFN projections (r=16, p=0.1)."""
    presets = {name: c for name, c in pelt_fast.methods().items() if name != "full"}
    lora = [
        Modification("low_rank", target, composition="scaled", size=16, scale=2.0, dropout=0.1)
        for target in _TARGETS
    ]
    return presets | {"lora_qv_ffn": PeltConfig("lora_qv_ffn", tuple(lora))}


@dataclass(frozen=True)
class Plan:
    """What is run: names, the batch, and the share of parameters that every method gets (None: the
    sizes of its preset)."""

    methods: tuple[str, ...] | None = None
    models: tuple[str, ...] = ("bart-768",)
    peers: tuple[str, ...] | None = None
    layers: int | None = None
    rows: int = 4
    source: int = 256
    target: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    repeats: int = 7
    text: Path | None = None
    share: float | None = None


QUICK = Plan(methods=QUICK_METHODS, peers=peers.QUICK, repeats=5)


def wanted(plan: Plan) -> list[tuple[Shape, str]]:
    """(model, method) of every row. ValueError for a name that does not exist."""
    known = methods()
    names = plan.methods or (EQUAL if plan.share else tuple(known))
    check_names("method", names, known)
    shapes = [shape(name) for name in plan.models]
    if plan.layers is not None:
        shapes = [replace(one, layers=plan.layers) for one in shapes]
    return [(one, name) for one in shapes for name in names]


def run(plan: Plan, record: Record, progress: bool = True) -> list[dict]:
    """Measure everything; returns the entries. An interrupted run keeps the entries it has."""
    names = peers.chosen(None if plan.peers is None else list(plan.peers))
    texts = text.lengths(plan.text)
    bar = tqdm(wanted(plan), disable=not progress, leave=False)
    for model_shape, name in bar:
        about = dict(model=model_shape.name, layers=model_shape.layers, method=name)
        bar.set_description(f"{model_shape.name} {name}")
        if not record.in_time:
            record.leave(f"{model_shape.name} {name}")
            continue
        try:
            for entry in measure(model_shape, name, plan, names, texts):
                record.add(**about, **entry)
        except torch.OutOfMemoryError as error:
            record.add(**about, skipped=str(error).splitlines()[0])
        torch.compiler.reset()  # torch.compile keeps every model it compiled
        gc.collect()
    record.finish()
    return record.entries


def measure(model_shape: Shape, name: str, plan: Plan, names: list[str], texts) -> Iterator[dict]:
    """The entries of one method on one model: one for each provider, or one with the reason for
    none."""
    try:
        reason = too_large(model_shape, plan)
        if reason is not None:
            yield dict(skipped=reason)
            return
        config = sized(name, model_shape, plan)
        right = dict(judged(model_shape, config, plan, names))
        base = made(model_shape, plan)
        injected = pelt_fast.inject(copy.deepcopy(base), config)
    except ValueError as error:  # the model has no place for this method
        yield dict(skipped=str(error))
        return
    batches = whole.batches(base, plan.rows, plan.source, plan.target, texts, 3, plan.device)
    found: list[Trained] = []
    for provider in peers.models(base, config, injected, names):
        if isinstance(provider, Absent):
            yield dict(provider=provider.name, absent=provider.reason)
        elif right.get(provider.name):
            yield dict(provider=provider.name) | right[provider.name]
        else:
            found.append(provider)
    steps = {p.name: whole.stepper(p, batches) for p in found}
    seconds = rounds(steps, plan.repeats, device=torch.device(plan.device))
    counted = flops(found, batches[0])
    for provider in found:
        yield dict(
            provider=provider.name, seconds=seconds[provider.name], note=provider.note,
            tokens=sum(map(whole.tokens, batches)) / len(batches), flops=counted[provider.name],
            **held(provider, steps[provider.name], batches[0], plan, injected),
        )  # fmt: skip
    on_gpu = torch.device(plan.device).type == "cuda"
    for provider in found if on_gpu else ():  # last: a capture that fails may break what follows
        yield dict(provider=provider.name, **as_graph(provider, batches[0]))


def too_large(model_shape: Shape, plan: Plan) -> str | None:
    """Why full fine-tuning and the copies beside it would not fit, or None."""
    with torch.device("meta"):
        model = build(model_shape)
    needed = sum(p.numel() for p in model.parameters()) * plan.dtype.itemsize * 8
    free = free_bytes(torch.device(plan.device))
    if needed <= free:
        return None
    return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free: fewer --layers?"


def made(model_shape: Shape, plan: Plan) -> torch.nn.Module:
    """The frozen model."""
    torch.manual_seed(0)
    model = build(model_shape, longest=max(plan.source, plan.target) + 256)
    return model.to(plan.device, plan.dtype).requires_grad_(False)


def sized(name: str, model_shape: Shape, plan: Plan) -> PeltConfig:
    """The method; with ``share`` at the sizes that give it that percentage of the base's
    parameters, as the paper counts, in equal parts for each kind of modification."""
    config = methods()[name]
    if plan.share is None:
        return config
    with torch.device("meta"):
        base = build(model_shape)
    budget = plan.share / 100 * sum(p.numel() for p in base.parameters())
    forms = {m.form for m in config.modifications}
    changed = []
    for m in config.modifications:
        ones = [replace(o, size=1) for o in config.modifications if o.form == m.form]
        with torch.device("meta"):
            one = pelt_fast.inject(build(model_shape), PeltConfig("one", tuple(ones)))
        unit = pelt_fast.count_parameters(one).paper
        changed.append(replace(m, size=max(1, round(budget / len(forms) / unit))))
    return replace(config, modifications=tuple(changed))


def judged(
    model_shape: Shape, config: PeltConfig, plan: Plan, names: list[str]
) -> Iterator[tuple[str, dict | None]]:
    """Each provider that trains the same function, with None where it is right: the largest error
    of any tensor at most twice PyTorch's largest, beside a rounding band."""
    small = replace(model_shape, layers=1, vocabulary=1000)
    base = made(small, plan)
    injected = whole.randomise(pelt_fast.inject(copy.deepcopy(base), config))
    lengths = [(24, 8), (32, 12)]
    (batch,) = whole.batches(base, 2, 32, 12, lengths, 1, plan.device)
    exact = copy.deepcopy(injected).double()
    oracle = whole.outcome(Trained("oracle", exact, whole.trainable(exact), around=as_plain), batch)
    same = Trained("", injected, whole.trainable(injected), around=as_plain)
    budget = 2 * _error(whole.outcome(same, batch), oracle)[1]
    budget += ROUNDING_BAND * torch.finfo(plan.dtype).eps
    for provider in peers.models(base, config, injected, names):
        if isinstance(provider, Absent) or provider.trained is None:
            continue
        try:
            name, off = _error(whole.outcome(provider, batch), oracle)
        except Exception as error:
            yield provider.name, failure(error)
            continue
        wrong = f"{name} is off by {off:.1e}, allowed {budget:.1e}"
        yield provider.name, None if off <= budget else dict(refused=wrong)


def _error(found: dict, oracle: dict) -> tuple[str, float]:
    """The tensor that is farthest from the oracle, relative to the oracle's largest magnitude."""
    if found.keys() != oracle.keys():
        return f"the set of trained tensors ({set(found) ^ set(oracle)})", float("inf")
    worst = "", 0.0
    for name, exact in oracle.items():
        size = exact.abs().max().item() or 1.0
        error = (found[name].double() - exact).abs().max().item() / size
        if not error <= worst[1]:  # NaN too
            worst = name, error
    return worst


def flops(found: list[Trained], batch: dict) -> dict[str, int | None]:
    """Flops of forward and backward of every provider; attention counts as its GEMMs. Ours are
    counted on the plain definition: the counter cannot look into an op."""
    counts: dict[str, int | None] = {}
    for provider in found:
        ours = provider.name.startswith("pelt_fast")
        plain = replace(provider, around=as_plain) if ours else provider
        if provider.opaque:
            counts[provider.name] = None
            continue
        counter, as_gemms = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
        with counter, as_gemms, plain.around():
            whole.loss_of(plain, batch).backward()
        provider.model.zero_grad()
        counts[provider.name] = counter.get_total_flops()
    return counts


def as_graph(provider: Trained, batch: dict) -> dict:
    """The step's time without the host's work."""
    if provider.opaque:
        return dict(no_graph="compiled by torch")
    seconds, reason = graph_seconds(provider, batch)
    return dict(graph_seconds=seconds) if reason is None else dict(no_graph=reason)


def held(
    provider: Trained, step: Callable, batch: dict, plan: Plan, injected: torch.nn.Module
) -> dict:
    """Bytes and counts of a provider."""
    saved = None
    if not provider.opaque:
        parameters = list(provider.model.parameters())
        with provider.around():
            saved = saved_bytes(lambda: whole.loss_of(provider, batch), parameters)
    growth = peak_growth(lambda: step(0), torch.device(plan.device))
    stays = standing(provider.model)
    found = dict(
        saved_bytes=saved, standing_bytes=stays,
        peak_bytes=None if growth is None else stays + growth,
        trainable=sum(p.numel() for p in provider.parameters),
        checkpoint_bytes=_checkpoint(provider),
    )  # fmt: skip
    if provider.name == "pelt_fast":
        count = pelt_fast.count_parameters(injected)
        found |= dict(paper_parameters=count.paper, kept_parameters=count.kept, base=count.base)
    return found


def _checkpoint(provider: Trained) -> int | None:
    """Bytes of the files that a user keeps."""
    if provider.save is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        provider.save(Path(folder) / "kept")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def rows(entries: list[dict]) -> list[dict]:
    """Timed entries with quartiles and the ratios to the frozen model and to full fine-tuning of
    the same rounds."""
    floors = {_key(e): e for e in entries if e.get("provider") in FLOORS and "seconds" in e}
    graphs = {_key(e): e["graph_seconds"] for e in entries if "graph_seconds" in e}
    found = []
    for entry in entries:
        if "seconds" not in entry:
            continue
        low, middle, high = quartiles(entry["seconds"])
        row = entry | dict(median=middle, low=low, high=high)
        row["graph_seconds"] = graphs.get(_key(entry))
        for name, key in zip(FLOORS, ("to_frozen", "to_full")):
            floor = floors.get((entry["model"], entry["layers"], entry["method"], name))
            if floor is not None:
                row[key] = quartiles(ratios(entry["seconds"], floor["seconds"]))
                row[f"flops_{key}"] = (entry["flops"] or nan) / floor["flops"]
                row[f"peak_{key}"] = (entry["peak_bytes"] or nan) / (floor["peak_bytes"] or nan)
        found.append(row)
    return found


def _key(entry: dict) -> tuple:
    return tuple(entry.get(name) for name in ("model", "layers", "method", "provider"))


HEADER = ["model", "method", "provider", "step, ms", "tokens/s", "to frozen", "flops to frozen",
          "to full", "saved, MB", "peak, MB", "trains, M", "kept, MB"]  # fmt: skip


def report(entries: list[dict]) -> str:
    """The table, with the reason of each provider that was not timed; the times as CUDA graphs
    where they were taken."""
    lines = []
    for row in rows(entries):
        to_frozen, to_full = (row.get(key, (nan,) * 3)[1] for key in ("to_frozen", "to_full"))
        lines.append([
            f"{row['model']}, {row['layers']} layers", row["method"],
            row["provider"] + (f" ({row['note']})" if row["note"] else ""),
            cell(row["median"], ".0f", 1e3), cell(row["tokens"] / row["median"], ".0f"),
            cell(to_frozen, ".2f"), cell(row.get("flops_to_frozen"), ".2f"), cell(to_full, ".2f"),
            cell(row["saved_bytes"], ".0f", 1e-6), cell(row["peak_bytes"], ".0f", 1e-6),
            cell(row["trainable"], ".2f", 1e-6), cell(row["checkpoint_bytes"], ".1f", 1e-6),
            cell(row.get("graph_seconds"), ".1f", 1e3),
        ])  # fmt: skip
    for entry in entries:
        why = why_not_timed(entry)
        if why is not None:
            where = f"{entry['model']}, {entry['layers']} layers"
            lines.append([where, entry["method"], entry.get("provider", "all"), why, *[""] * 9])
    if any("graph_seconds" in entry for entry in entries):
        return table([*HEADER, "CUDA graph, ms"], lines)
    return table(HEADER, [line[:-1] for line in lines])
