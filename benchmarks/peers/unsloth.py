"""unsloth's LoRA linear (``LoRA_W``), where it can be imported without changing the process."""

import importlib.util
import sys
from collections.abc import Iterator

from benchmarks.problems import Absent, Problem, Provider

NAME = "unsloth LoRA_W"


def why_not(problem: Problem) -> str | None:
    """Why it is not measured, or None."""
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    if "unsloth" not in sys.modules:
        return "importing unsloth patches transformers, TRL and PEFT in this process"
    if problem.p:
        return "its function has no dropout"
    return None if problem.device.type == "cuda" else "its kernels need a GPU"


def layer(problem: Problem) -> Iterator[Provider | Absent]:
    """One linear layer without bias and dropout: the function has neither."""
    if problem.subject != "LoRA linear":
        return
    reason = why_not(problem)
    if reason is not None:
        yield Absent(NAME, reason)
        return
    from unsloth.kernels.fast_lora import LoRA_W

    weight, scale = problem.frozen["weight"], problem.options["scale"]
    trained = {n: t.detach().to(problem.dtype).requires_grad_() for n, t in problem.trained.items()}

    def call(x):
        y = LoRA_W.apply(x, weight, None, trained["lora_a"], trained["lora_b"], scale)
        bias = problem.frozen.get("bias")
        return y if bias is None else y + bias

    yield Provider(NAME, call, trained)
