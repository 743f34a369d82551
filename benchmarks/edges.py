"""The sizes at which another plan takes over: a step just above each beside a step just below.

    pelt-fast bench edges

The cost just above is divided by the growth of the work, one part in many. It should be at most
``MOST`` times the cost just below, or the plan that takes over is the slower one.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pelt_fast import functional
from pelt_fast.kernels import config
from pelt_fast.ops.common import passes
from pelt_fast.ops.prefix_attention import cpu as prefix_cpu

from .common import table
from .record import Record
from .timing import rounds

MOST = 1.10
WIDTH, INNER, HEADS = 768, 3072, 12
BELOW, ABOVE = "below", "above"
Step = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run."""

    models: tuple[str, ...] = ()
    rows: int = 256
    repeats: int = 15
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class Edge:
    """A threshold: its name, the largest size below it, and the step of a size."""

    name: str
    last: int
    step: Callable[[int], Step]


def wanted(plan: Plan) -> list[str]:
    """The names of the edges on the plan's device."""
    return [edge.name for edge in edges(plan)]


def edges(plan: Plan) -> Iterator[Edge]:
    """Every threshold at which an op changes its plan."""
    if plan.device == "cuda":
        for kernel in sorted(config.FUSED_RANK):
            limit = config.fused_rank(kernel, torch.device(plan.device))
            if limit:
                step = adapter if kernel == "adapter" else lora
                yield Edge(f"rank of {kernel}", limit, lambda r, s=step: s(plan, plan.rows, r))
        return
    yield Edge("rows without packing", passes.FEW_ROWS, lambda n: lora(plan, n, 16, False))
    yield Edge("rows of a decoder's product", passes.MAX_FEW, lambda n: _block(plan, n, 16))
    plain, masked = passes.PLAIN_RANK, passes.MASKED_RANK
    yield Edge("rank of LoRA", plain, lambda r: lora(plan, plan.rows, r))
    yield Edge("rank of LoRA with dropout", masked,
               lambda r: lora(plan, plan.rows, r, dropout_p=0.1))  # fmt: skip
    yield Edge("rank of an adapter", plain, lambda r: adapter(plan, plan.rows, r))
    yield Edge("prefix length", prefix_cpu.MAX_PREFIX, lambda p: _prefix(plan, p, 64))
    yield Edge("head dim under a prefix", prefix_cpu.MAX_HEAD_DIM, lambda d: _prefix(plan, 32, d))


def run(plan: Plan, record: Record, progress: bool = True) -> list[dict]:
    """Measure each edge; returns the entries."""
    for edge in edges(plan):
        if not record.in_time:
            record.leave(edge.name)
            continue
        steps = {BELOW: edge.step(edge.last), ABOVE: edge.step(edge.last + 1)}
        seconds = rounds(steps, plan.repeats, device=torch.device(plan.device))
        for provider, times in seconds.items():
            record.add(edge=edge.name, last=edge.last, provider=provider, seconds=times)
    record.finish()
    return record.entries


def _maker(plan: Plan) -> Callable[..., Tensor]:
    def made(*shape: int, trained: bool = False) -> Tensor:
        dtype = torch.float32 if trained else plan.dtype
        t = torch.randn(*shape, device=plan.device) / shape[-1] ** 0.5
        return t.to(dtype).requires_grad_(trained)

    return made


def _training(function: Callable[[Tensor], Tensor], x: Tensor, backward: bool = True) -> Step:
    """A step of ``function``: forward and backward, or forward without autograd."""

    def step(_: int) -> None:
        if not backward:
            with torch.no_grad():
                function(x)
            return
        function(x.detach().requires_grad_()).sum().backward()

    return step


def lora(plan: Plan, rows: int, rank: int, backward: bool = True, dropout_p: float = 0.0) -> Step:
    """A step of a LoRA linear."""
    made = _maker(plan)
    w, a, b = made(WIDTH, WIDTH), made(rank, WIDTH, trained=True), made(WIDTH, rank, trained=True)
    x = made(rows, WIDTH)
    return _training(
        lambda x: functional.lora_linear(x, w, None, a, b, scale=2.0, dropout_p=dropout_p), x,
        backward=backward,
    )  # fmt: skip


def adapter(plan: Plan, rows: int, rank: int, dropout_p: float = 0.0) -> Step:
    """A training step of a sequential adapter."""
    made = _maker(plan)
    down, up = made(rank, WIDTH, trained=True), made(WIDTH, rank, trained=True)
    x = made(rows, WIDTH)
    return _training(
        lambda x: functional.sequential_adapter(x, down, None, up, None, dropout_p=dropout_p), x
    )


def _block(plan: Plan, rows: int, rank: int) -> Step:
    """The widened FFN of a decoder's step."""
    made = _maker(plan)
    w1, w2, down, up = (
        made(*shape)
        for shape in ((INNER, WIDTH), (WIDTH, INNER), (rank, WIDTH), (WIDTH, rank))
    )  # fmt: skip
    x = made(rows, WIDTH)
    return _training(
        lambda x: functional.ffn_parallel_adapter(x, w1, None, w2, None, down, None, up, None),
        x, backward=False,
    )  # fmt: skip


def _prefix(plan: Plan, length: int, dim: int) -> Step:
    made = _maker(plan)
    q, k, v = (made(2, HEADS, plan.rows // 2, dim) for _ in range(3))
    prefix = [made(HEADS, length, dim, trained=True) for _ in range(2)]
    return _training(lambda q: functional.prefix_attention(q, k, v, *prefix), q)


def rows(entries: list[dict]) -> list[dict]:
    """Each edge with its medians, and the cost above over that below for the same work."""
    pairs: dict[str, dict[str, dict]] = {}
    for entry in entries:
        pairs.setdefault(entry["edge"], {})[entry["provider"]] = entry
    found = []
    for name, pair in pairs.items():
        if pair.keys() != {BELOW, ABOVE}:
            continue
        below, above, last = pair[BELOW]["seconds"], pair[ABOVE]["seconds"], pair[BELOW]["last"]
        each = [a / b for a, b in zip(above, below, strict=True)]
        ratio = statistics.median(each) * last / (last + 1)
        found.append(dict(edge=name, last=last, below=statistics.median(below),
                          above=statistics.median(above), ratio=ratio))  # fmt: skip
    return found


def report(entries: list[dict]) -> str:
    """The table."""
    header = ["edge", "sizes", "below, ms", "above, ms", f"ratio, at most {MOST:.2f}"]
    lines = []
    for row in rows(entries):
        verdict = ", SLOWER" if row["ratio"] > MOST else ""
        lines.append([
            row["edge"], f"{row['last']} / {row['last'] + 1}", f"{1e3 * row['below']:.2f}",
            f"{1e3 * row['above']:.2f}", f"{row['ratio']:.2f}{verdict}",
        ])  # fmt: skip
    return table(header, lines)
