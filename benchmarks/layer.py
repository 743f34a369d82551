"""Layers with a method on them: time of forward and of forward + backward to the input, and bytes
kept for backward; ours, the frozen layer's and every peer's take turns in one run.

The frozen layer is the floor. The docstrings of the ops and of kernels/ give the flops and bytes
that each method adds. A provider whose output or gradients miss the error budget on the same
inputs is not timed. A provider that draws its own dropout masks is judged with dropout off.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from . import peers
from .common import cell, saved_bytes, table
from .problems import Absent, Judge, Problem, Provider, as_tuple, failure, why_not_timed
from .record import Record
from .shapes import Shape, shape
from .subjects import SUBJECTS, Setting, is_prefix, subject
from .timing import copies, quartiles, ratios, rounds

RANKS, PREFIXES, DROPOUTS = (4, 16, 64, 512), (8, 30, 200), (0.0, 0.1)
MODELS = (
    "roberta-base", "roberta-large", "bart-large", "mbart-large", "t5-large", "llama-3-8b",
    "qwen3-8b",
)  # fmt: skip
MODES = ("forward", "forward + backward")
ORACLE = 6  # additional bytes of a judged problem (fp64, gradients), in units of its own bytes


@dataclass(frozen=True)
class Plan:
    """What is run; None stands for everything. ``quick``: one size for each subject, dropout only
    where it matters most."""

    methods: tuple[str, ...] = tuple(SUBJECTS)
    models: tuple[str, ...] = MODELS
    sizes: tuple[int, ...] | None = None
    dropouts: tuple[float, ...] = DROPOUTS
    peers: tuple[str, ...] | None = None
    setting: Setting = field(default_factory=Setting)
    repeats: int = 9
    quick: bool = False


QUICK = Plan(models=("bart-large",), peers=peers.QUICK, repeats=5, quick=True)
QUICK_SIZES = {"lora": (16,), "qkv": (16,), "ffn": (512,)}
QUICK_ADAPTER, QUICK_PREFIX = (64,), (30,)
QUICK_WITHOUT_DROPOUT = ("qkv", "sequential", "parallel", "scaled")


def wanted(plan: Plan) -> list[tuple[str, Shape, int, float]]:
    """(subject, shape, size, p) of every problem. ValueError for a name that does not exist."""
    found = []
    shapes = [shape(name) for name in plan.models]
    for name in plan.methods:
        subject(name)
        sizes = plan.sizes or (PREFIXES if is_prefix(name) else RANKS)
        dropouts = (0.0,) if is_prefix(name) else plan.dropouts
        if plan.quick and plan.sizes is None:
            sizes = QUICK_SIZES.get(name, QUICK_PREFIX if is_prefix(name) else QUICK_ADAPTER)
        if plan.quick and name in QUICK_WITHOUT_DROPOUT:
            dropouts = dropouts[:1]
        found += [(name, one, size, p) for one in shapes for size in sizes for p in dropouts]
    return found


def too_large(name: str, shape: Shape, size: int, p: float, setting: Setting) -> str | None:
    """Why a problem does not fit in memory, or None; nothing is allocated."""
    needed = subject(name)(shape, size, p, replace(setting, device="meta")).nbytes * ORACLE
    free = free_bytes(torch.device(setting.device))
    if needed <= free:
        return None
    return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30


def run(plan: Plan, record: Record, progress: bool = True) -> list[dict]:
    """Measure everything; returns the entries. An interrupted run keeps the entries it has."""
    names = peers.chosen(None if plan.peers is None else list(plan.peers))
    todo = wanted(plan)
    bar = tqdm(todo, disable=not progress, leave=False)
    for name, one, size, p in bar:
        about = dict(method=name, model=one.name, size=size, p=p)
        label = f"{name} {one.name} {size} p={p:g}"
        bar.set_description(label)
        if not record.in_time:
            record.leave(label)
            continue
        reason = too_large(name, one, size, p, plan.setting)
        if reason is not None:
            record.add(**about, skipped=reason)
            continue
        try:
            for entry in measure(name, one, size, p, plan.setting, names, plan.repeats):
                record.add(**about, **entry)
        except torch.OutOfMemoryError as error:
            record.add(**about, skipped=str(error).splitlines()[0])
        torch.compiler.reset()  # torch.compile keeps everything it compiled
    record.finish()
    return record.entries


def measure(
    name: str, shape: Shape, size: int, p: float, setting: Setting, names: list[str], repeats: int
) -> Iterator[dict]:
    """The entries of one problem: one for each provider and mode, or one with a reason."""
    problem = subject(name)(shape, size, p, setting)
    about = dict(layer=problem.title)
    right: list[Provider] = []
    for provider, verdict in judged(name, problem, setting, names):
        if isinstance(verdict, dict):
            yield about | dict(provider=provider.name) | verdict
        else:
            right.append(provider)
    sets = copies(problem.inputs, problem.device)
    dys = [torch.randn_like(y) for y in as_tuple(problem.floor(problem.inputs, problem.frozen))]
    for mode in MODES:
        steps = {q.name: step(q, sets, dys, mode) for q in right}
        seconds = rounds(steps, repeats, device=problem.device)
        for provider in right:
            found = dict(provider=provider.name, mode=mode, seconds=seconds[provider.name])
            if mode == MODES[-1]:
                found["saved_bytes"] = kept(provider, problem)
            yield about | found


def judged(
    name: str, problem: Problem, setting: Setting, names: list[str]
) -> Iterator[tuple[Provider | Absent, dict | None]]:
    """Every provider with None if it is right, else with the reason why it is not timed."""
    judge, twins = Judge(problem), {}
    if problem.p:
        twin = subject(name)(problem.shape, problem.size, 0.0, setting)
        judge_of_twin, twins = Judge(twin), {q.name: q for q in peers.providers(twin, names)}
    for provider in peers.providers(problem, names):
        if isinstance(provider, Absent):
            yield provider, dict(absent=provider.reason)
        elif provider.name == "frozen":
            yield provider, None
        else:
            known = provider.philox or not problem.p
            try:
                found = judge(provider) if known else judge_of_twin(twins[provider.name])
            except Exception as error:
                yield provider, failure(error)
                continue
            wrong = f"{found.tensor} is off by {found.error:.1e}, allowed {found.budget:.1e}"
            yield provider, None if found.ok else dict(refused=wrong)


def step(provider: Provider, sets: list, dys: list[torch.Tensor], mode: str):
    """One training pass of a provider on the inputs of a round; gradients start as None."""
    backward = mode == MODES[-1]

    def run(i: int) -> None:
        leaves = [t.detach().requires_grad_() for t in sets[i % len(sets)]]
        for tensor in provider.trained.values():
            tensor.grad = None
        with provider.around():
            outputs = as_tuple(provider.call(*leaves))
            if backward:
                torch.autograd.backward(outputs, dys)

    return run


def kept(provider: Provider, problem: Problem) -> int | None:
    """Bytes kept for backward without inputs and weights; None if they cannot be counted."""
    if provider.opaque:
        return None
    leaves = [t.detach().requires_grad_() for t in problem.inputs]
    known = [*leaves, *problem.frozen.values(), *problem.trained.values()]
    with provider.around():
        return saved_bytes(lambda: provider.call(*leaves), [*known, *provider.trained.values()])


def rows(entries: list[dict]) -> list[dict]:
    """Entries with median, quartiles and the ratio to the frozen layer of the same rounds."""
    floors = {(e["layer"], e["mode"]): e["seconds"] for e in entries
              if e.get("provider") == "frozen" and "seconds" in e}  # fmt: skip
    found = []
    for entry in entries:
        if "seconds" not in entry:
            continue
        floor = floors.get((entry["layer"], entry["mode"]))
        low, middle, high = quartiles(entry["seconds"])
        ratio = quartiles(ratios(entry["seconds"], floor)) if floor else (float("nan"),) * 3
        found.append(entry | dict(median=middle, low=low, high=high, ratio=ratio))
    return found


HEADER = ["layer", "provider", "forward, ms", "to frozen", "forward + backward, ms", "to frozen",
          "quartiles", "saved, MB"]  # fmt: skip


def report(entries: list[dict]) -> str:
    """The table, with the reason of each provider that was not timed."""
    timed: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows(entries):
        timed.setdefault((row["layer"], row["provider"]), {})[row["mode"]] = row
    lines = []
    for (layer, provider), modes in timed.items():
        if not all(mode in modes for mode in MODES):
            continue  # cut short
        forward, both = (modes[mode] for mode in MODES)
        lines.append([
            layer, provider, f"{1e3 * forward['median']:.2f}", f"{forward['ratio'][1]:.2f}",
            f"{1e3 * both['median']:.2f}", f"{both['ratio'][1]:.2f}",
            f"{both['ratio'][0]:.2f} to {both['ratio'][2]:.2f}",
            cell(both["saved_bytes"], ".1f", 1e-6),
        ])  # fmt: skip
    for entry in entries:
        why = why_not_timed(entry)
        if why is not None:
            name = entry["layer"] if "layer" in entry else _label(entry)
            lines.append([name, entry.get("provider", "all"), *[""] * 4, why, ""])
    return table(HEADER, lines)


def _label(entry: dict) -> str:
    return f"{entry['method']}, {entry['model']}, {entry['size']}"
