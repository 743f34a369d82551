"""Liger: its gated activation in the frozen part, and a plain parallel adapter. Liger has no kernel
for the methods that are measured here."""

from collections.abc import Iterator

from torch.nn import functional as F

from benchmarks.problems import Absent, Problem, Provider, torchs_dropout

NAME = "Liger SwiGLU + plain adapter"


def layer(problem: Problem) -> Iterator[Provider | Absent]:
    """The gated FFNs; no other layer."""
    if not (problem.subject.startswith("gated") and problem.shape.activation == "silu"):
        return
    if problem.device.type == "cpu":
        yield Absent(NAME, "its kernels need a GPU")
        return
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        yield Absent(NAME, str(error))
        return
    frozen, trained, scale = problem.frozen, problem.trained, problem.options["scale"]
    drop = torchs_dropout(problem.p)(3)

    def call(x):
        inner = LigerSiLUMulFunction.apply(
            F.linear(x, frozen["gate_weight"]), F.linear(x, frozen["in_weight"])
        )
        down, down_bias, up, up_bias = (t.to(x.dtype) for t in trained.values())
        h = drop(F.relu(F.linear(x, down, down_bias)), 0)
        y = drop(F.linear(inner, frozen["out_weight"]), 2)
        return y + scale * F.linear(h, up, up_bias)

    yield Provider(NAME, call, trained)
