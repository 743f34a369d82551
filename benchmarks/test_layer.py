"""The quick layers under pytest-benchmark: its timing, tables, storage and comparison.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks -k lora --benchmark-compare --benchmark-compare-fail=median:10%

Problems, providers and the judge are those of ``layer.py``. Before each timed round of a provider
the frozen layer runs once, so that ``extra_info`` has ratios within a round. In ``pelt-fast bench
layer`` all providers take turns.
"""

import functools
import itertools
import statistics
import time

import pytest
import torch

from benchmarks import layer, peers
from benchmarks.problems import Provider, as_tuple
from benchmarks.subjects import Setting, subject
from benchmarks.timing import copies

ROUNDS = 5
NAMES = ("frozen", "pelt_fast", "pelt_fast reference", "plain PyTorch", "PEFT",
         "concatenation + SDPA")  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTING = Setting(dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32, device=DEVICE)


@functools.lru_cache(maxsize=1)  # the last problem: the tests of one problem follow one another
def judged(case: tuple) -> tuple:
    """The problem, its inputs and output gradients, and every provider with its verdict."""
    name, shape, size, p = case
    problem = subject(name)(shape, size, p, SETTING)
    found = list(layer.judged(name, problem, SETTING, peers.chosen(list(layer.QUICK.peers))))
    dys = [torch.randn_like(y) for y in as_tuple(problem.floor(problem.inputs, problem.frozen))]
    return problem, copies(problem.inputs, problem.device), dys, {q.name: (q, v) for q, v in found}


def label(case: tuple) -> str:
    """How pytest calls a case."""
    name, shape, size, p = case
    return f"{name}-{shape.name}-{size}-p{p:g}"


@pytest.mark.parametrize("mode", layer.MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", layer.wanted(layer.QUICK), ids=label)
def test_layer(case, name, mode, benchmark):
    problem, sets, dys, providers = judged(case)
    if name not in providers:
        pytest.skip(f"{name} does not solve this problem")
    provider, verdict = providers[name]
    assert verdict is None, verdict
    benchmark.group = f"{problem.title}, {mode}"
    steps = [layer.step(q, sets, dys, mode) for q in (providers["frozen"][0], provider)]
    turn, floors = itertools.count(), []

    def floor() -> None:
        start = time.perf_counter()
        _finished(steps[0], next(turn))
        floors.append(time.perf_counter() - start)

    benchmark.pedantic(lambda: _finished(steps[1], next(turn)), setup=floor, rounds=ROUNDS,
                       warmup_rounds=1)  # fmt: skip
    if benchmark.stats is not None:
        times = benchmark.stats.stats.data
        pairs = zip(times, floors[-len(times) :], strict=True)
        benchmark.extra_info["to_frozen"] = statistics.median(a / b for a, b in pairs)
        benchmark.extra_info["saved_bytes"] = _kept(provider, problem, mode)


def _finished(step, i: int) -> None:
    step(i)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _kept(provider: Provider, problem, mode: str) -> int | None:
    return layer.kept(provider, problem) if mode == layer.MODES[-1] else None
