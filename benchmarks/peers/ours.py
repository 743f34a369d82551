"""pelt_fast: its default, each of its plans, and its reference."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import functional as F

import pelt_fast
from benchmarks.problems import Problem, Provider
from benchmarks.whole import Trained, trainable
from pelt_fast import backend, functional
from pelt_fast.kernels import config
from pelt_fast.modules.packing import Packing, Packings

NAME = "pelt_fast"
LORA_PLANS = ("accumulate", "tail", "tail_descriptor")
CONTEXTS = ("flash", "cudnn")
OPS = ("low_rank", "bottleneck", "prefix")  # forms that run one of our ops


def layer(problem: Problem) -> Iterator[Provider]:
    """The default, each plan a GPU has, and the reference, which is plain PyTorch with masks that
    are drawn again in backward, not stored."""
    call = _CALLS[_family(problem)](problem)

    def provider(name, around=contextlib.nullcontext):
        return Provider(name, call, problem.trained, philox=True, around=around)

    yield provider(NAME)
    if problem.device.type == "cuda":
        table, answers = _plans(problem)
        for answer in answers:
            yield provider(f"{NAME}, {answer}", lambda a=answer: config.forced(table, a))
    yield provider(f"{NAME} reference", lambda: backend("reference"))


def model(base, config, injected) -> Iterator[Trained]:
    """The injected model, with the fused ops and with the references."""
    trained = trainable(injected)

    def save(folder):
        pelt_fast.save(injected, folder)

    yield Trained(NAME, injected, trained, save)
    if any(m.form in OPS for m in config.modifications):
        reference = f"{NAME} reference"
        yield Trained(reference, injected, trained, save, around=lambda: backend("reference"))


def _plans(problem: Problem) -> tuple[str, tuple[str, ...]]:
    family = _family(problem)
    if family == "lora":
        return "plan", LORA_PLANS
    return ("context", CONTEXTS) if family == "prefix" else ("", ())


def _family(problem: Problem) -> str:
    if problem.subject.startswith("LoRA"):
        return "lora"
    if problem.subject.startswith("prefix"):
        return "prefix"
    return "ffn" if "FFN" in problem.subject else "adapter"


def _lora(problem: Problem):
    frozen, trained, scale = problem.frozen, problem.trained, problem.options["scale"]

    def one(x, name):
        return functional.lora_linear(
            x, frozen[f"{name}weight"], frozen.get(f"{name}bias"), trained[f"{name}lora_a"],
            trained[f"{name}lora_b"], scale=scale, dropout_p=problem.p,
        )  # fmt: skip

    names = problem.options.get("names")
    if names is None:
        return lambda x: one(x, "")
    return lambda x: tuple(one(x, name) for name in names)


def _adapter(problem: Problem):
    frozen, trained, scale = problem.frozen, problem.trained, problem.options["scale"]
    settings = dict(scale=scale, dropout_p=problem.p)

    def call(x):
        y = F.linear(x, frozen["weight"], frozen.get("bias"))
        if problem.options["sequential"]:
            return functional.sequential_adapter(y, *trained.values(), **settings)
        return functional.parallel_adapter(y, x, *trained.values(), **settings)

    return call


def _ffn(problem: Problem):
    frozen, trained, scale = problem.frozen, problem.trained, problem.options["scale"]
    rank = trained["down_weight"].shape[0]
    weights = {
        name: torch.nn.Parameter(frozen[name], requires_grad=False)
        for name in ("gate_weight", "in_weight", "out_weight") if name in frozen
    }  # fmt: skip
    packings = Packings(Packing(0, rank), Packing(1, rank) if problem.p == 0 else None)
    *stacked, out = weights.values()
    packings.pack(stacked, out)

    def call(x):
        return functional.ffn_parallel_adapter(
            x, weights["in_weight"], frozen.get("in_bias"), out, frozen.get("out_bias"),
            *trained.values(), gate_weight=weights.get("gate_weight"),
            gate_bias=frozen.get("gate_bias"), ffn_activation=problem.shape.activation,
            scale=scale, dropout_p=problem.p, output_dropout_p=problem.p, packings=packings,
        )  # fmt: skip

    return call


def _prefix(problem: Problem):
    settings = dict(attn_mask=problem.frozen.get("mask"), is_causal=problem.options["causal"])
    return lambda q, k, v: functional.prefix_attention(
        q, k, v, *problem.trained.values(), **settings
    )


_CALLS = {"lora": _lora, "adapter": _adapter, "ffn": _ffn, "prefix": _prefix}
