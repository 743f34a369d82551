"""The problems of the layer benchmark, and the providers that solve them."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pelt_fast.ops.common.dropout import draw_seed, dropout
from pelt_fast.testing import Verdict, compare

from .shapes import Shape

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """A frozen layer and a method on it.

    ``expression(masks, inputs, frozen, trained)`` is the definition in plain PyTorch;
    ``masks(count)`` draws the dropouts of one op and gives ``drop(tensor, row)``.
    ``floor(inputs, frozen)`` is the frozen layer; ``options`` are further settings.
    """

    subject: str
    shape: Shape
    dims: str
    size: int
    p: float
    inputs: tuple[Tensor, ...]
    frozen: dict[str, Tensor]
    trained: dict[str, torch.nn.Parameter]
    floor: Callable
    expression: Callable
    options: dict = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name in tables."""
        kind = "P" if self.subject.startswith("prefix") else "r"
        rate = f", p={self.p:g}" if self.p else ""
        return f"{self.subject}, {self.shape.name} {self.dims}, {kind}={self.size}{rate}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.inputs[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.inputs[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in (*self.inputs, *self.frozen.values(), *self.trained.values()))


@dataclass(frozen=True)
class Provider:
    """One way to solve a problem: ``call(*inputs)``, and its trainable tensors under the problem's
    names. ``philox``: its dropout masks are those of the definition. ``around`` makes a context
    for forward and backward. ``opaque``: compiled, so that what it keeps is not seen."""

    name: str
    call: Callable[..., Outputs]
    trained: dict[str, Tensor]
    philox: bool = False
    around: Callable = contextlib.nullcontext
    opaque: bool = False


@dataclass(frozen=True)
class Absent:
    """A provider that is not measured, and the reason."""

    name: str
    reason: str


def failure(error: Exception) -> dict:
    """The entry of a provider that fails; a failure is a result."""
    reason = (str(error).splitlines() or [""])[0][:160]
    return dict(failed=f"{type(error).__name__}: {reason}")


def why_not_timed(entry: dict) -> str | None:
    """The reason in an entry without a time, or None."""
    kinds = ("absent", "refused", "failed", "skipped")
    return next((f"{kind}: {entry[kind]}" for kind in kinds if kind in entry), None)


def no_dropout(count: int) -> Callable:
    """Masks that keep everything."""
    return lambda tensor, row: tensor


def torchs_dropout(p: float) -> Callable:
    """torch's own dropout."""
    return lambda count: lambda tensor, row: torch.nn.functional.dropout(tensor, p)


def philox_dropout(p: float, device: torch.device) -> Callable:
    """pelt_fast's dropout, with the seeds that its functions draw."""

    def masks(count: int) -> Callable:
        if p == 0:
            return no_dropout(count)
        seeds = draw_seed(device, count)
        return lambda tensor, row: dropout(tensor, p, seeds[row])

    return masks


def outcome(call: Callable, inputs, trained: dict[str, Tensor], around) -> dict[str, Tensor]:
    """Outputs and every gradient for one seed and one output gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.random.fork_rng(), around():
        torch.manual_seed(2)
        outputs = as_tuple(call(*leaves))
        torch.manual_seed(3)
        # drawn on the CPU in one dtype: the same numbers for every device and precision
        dys = [torch.randn(y.shape).to(y.device, y.dtype) for y in outputs]
        for tensor in trained.values():
            tensor.grad = None
        torch.autograd.backward(outputs, dys)
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"d_input{i}": t.grad for i, t in enumerate(leaves)}
    for name, tensor in trained.items():
        found[f"d_{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        tensor.grad = None
    return found


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """One output or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Judge:
    """The fp64 oracle of a problem and PyTorch's own error beside it, each computed once."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __call__(self, provider: Provider) -> Verdict:
        """How far a provider is from the oracle. Its masks must be known: dropout off, or
        ``philox``."""
        problem = self.problem
        if problem.p and not provider.philox:
            raise ValueError(f"{provider.name} draws its own dropout masks: judge it with p = 0")
        same, oracle = self.oracle
        actual = outcome(provider.call, problem.inputs, provider.trained, provider.around)
        return compare(actual, same, oracle, problem.dtype)

    @functools.cached_property
    def oracle(self) -> tuple[dict, dict]:
        """PyTorch's outcome in the problem's dtype, and in fp64."""
        problem = self.problem
        masks = philox_dropout(problem.p, problem.device)

        def run(cast):
            inputs = [cast(t) for t in problem.inputs]
            frozen = {name: cast(t) for name, t in problem.frozen.items()}
            trained = {name: cast(t).requires_grad_() for name, t in problem.trained.items()}
            call = lambda *leaves: problem.expression(masks, leaves, frozen, trained)  # noqa: E731
            return outcome(call, inputs, trained, contextlib.nullcontext)

        return run(lambda t: t.detach()), run(_double)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor
