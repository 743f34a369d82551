"""One family under one method: refused with its reason, or everything about it holds."""

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

import pelt_fast
from pelt_fast.injection import explain, inject  # here, once for every fork
from pelt_fast.injection.synthetic_batch import synthetic_batch
from pelt_fast.layouts.layout import PromptLayout
from pelt_fast.layouts.lookup import base_of, stacks_of

from . import tiny
from .formula import attach

METHODS = (
    "lora", "lora_ffn", "houlsby", "pfeiffer", "parallel_adapter_attn", "scaled_parallel_adapter",
    "multi_head_parallel_adapter", "prefix", "mam", "bitfit", "prompt",
)  # fmt: skip
RANK, TRIES = 8, 4
# of the largest gradient or output, in fp32: a wrong formula is off by a hundred times more
TOLERANCE = 2e-3


class Wrong(AssertionError):
    """A cell that does not hold."""


class TooSmall(Exception):
    """Nothing can be told from a model whose output hardly depends on the method."""


def config_of(method: str):
    """A preset without dropout, of a rank that fits a tiny model."""
    config = dataclasses.replace(pelt_fast.methods()[method], train_head=False)
    if method == "bitfit":
        return config
    more = {} if method == "prompt" else dict(dropout=0.0)
    return config.replace(size=RANK, **more)


class Family:
    """A tiny model of one family and its input."""

    def __init__(self, kind: str, class_name: str):
        self.kind, self.class_name = kind, class_name
        self.plain = self.made()
        self.batch = synthetic_batch(base_of(self.plain))
        with torch.no_grad():
            self.output, again = self.run(self.plain), self.run(self.plain)
        if not self.output.isfinite().all():
            raise ValueError("the base's own output is not finite")
        if not torch.equal(self.output, again):
            raise ValueError("the base gives another answer each time")
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.randn(self.output.shape, generator=generator)

    def made(self) -> nn.Module:
        """The model, the same each time."""
        return tiny.model(self.kind, self.class_name)

    def run(self, model: nn.Module) -> Tensor:
        """The first tensor that the base model gives."""
        return _first(base_of(model)(**self.batch))

    def gradients(self, model: nn.Module, wanted: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """The output, and the gradients of ``wanted`` (None where one does not take part)."""
        output = self.run(model)
        loss = (output * self.weights).sum() / output.numel() ** 0.5
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return output.detach(), dict(zip(wanted, found))


def _first(output) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(found for value in values if (found := _floating(value)) is not None)


def _floating(value) -> Tensor | None:
    if isinstance(value, (tuple, list)):
        return next((found for v in value if (found := _floating(v)) is not None), None)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def cell(family: Family, method: str) -> dict:
    """What a cell of the table says: {"holds": True, ..}, {"refused": reason}; Wrong where the
    method neither works nor is refused."""
    model = family.made()
    before = _state(model)
    torch.manual_seed(2)
    try:
        inject.inject(model, config_of(method))
    except ValueError as error:
        _check_untouched(model, before)
        return {"refused": str(error)}
    found = {"holds": True, "sites": len(model._pelt.sites)}
    found["fallbacks"] = sorted({s.reason for s in explain.explain(model).fallbacks})
    _randomise(model)
    if method == "bitfit":
        if not family.run(model).requires_grad:
            return {"refused": "None of its biases takes part in this forward"}
        _check_biases(family, model)
    elif method == "prompt":
        _check_prompt(family, model)
        _check_training(family, model)
    else:
        _check_formula(family, model)
        _check_training(family, model)
    # what the base's own forwards count in buffers (BatchNorm's averages) is not the method's
    counted = {n: v for n, v in before[0].items() if n in _buffers(model)}
    model.load_state_dict(counted, strict=False)
    inject.eject(model)
    _check_untouched(model, before)
    with torch.no_grad():  # a CPU kernel may round otherwise where a tensor is aligned otherwise
        if not any(torch.equal(family.run(model), family.output) for _ in range(TRIES)):
            raise Wrong("after eject the output is another")
    return found


def _buffers(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


def _state(model: nn.Module) -> tuple[dict, list]:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return values, [p.requires_grad for p in model.parameters()]


def _check_untouched(model: nn.Module, before: tuple[dict, list]) -> None:
    values, flags = before
    now = model.state_dict()
    if now.keys() != values.keys() or [p.requires_grad for p in model.parameters()] != flags:
        raise Wrong("the model's parameters are not those from before")
    for name, value in values.items():
        if not torch.equal(now[name].nan_to_num(), value.nan_to_num()):
            raise Wrong(f"{name} is not what it was")


def _randomise(model: nn.Module) -> None:
    """Updates of a size that shows."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = 0.3 if "pelt_" in name else 0.05
                parameter.add_(step * torch.randn_like(parameter))
                if name.endswith("down_bias"):
                    parameter.add_(0.5)  # so that no ReLU is zero for every token


def _check_formula(family: Family, model: nn.Module) -> None:
    """Output and gradients are those of hooks on a copy of the base."""
    wanted = {n: p for n, p in model.named_parameters() if "pelt_" in n and p.requires_grad}
    output, gradients = family.gradients(model, wanted)
    twin = copy.deepcopy(family.plain).requires_grad_(False)
    leaves = attach(twin, model)
    expected, theirs = family.gradients(twin, {name: leaves[name] for name in wanted})
    _check_close("the output", output, expected, expected.norm().item())
    if (output - family.output).norm() < 1e-5 * family.output.norm():
        raise TooSmall("its effect on this tiny model is below fp32's rounding")
    size = max(g.norm().item() for g in theirs.values() if g is not None)
    idle = 0  # an attention to one token has no gradient of its queries
    for name, gradient in gradients.items():
        if gradient is None or theirs[name] is None:
            raise Wrong(f"{name} takes no part in the output")
        idle += not theirs[name].any()
        _check_close(f"the gradient of {name}", gradient, theirs[name], size)
    if idle > len(gradients) / 2:
        raise Wrong(f"{idle} of {len(gradients)} tensors take no part in the output")


def _check_close(what: str, found: Tensor, expected: Tensor, size: float) -> None:
    error = (found.double() - expected.double()).norm().item() / max(size, 1e-30)
    if not error <= TOLERANCE or math.isnan(error):
        raise Wrong(f"{what} is off by {error:.2g}")


def _check_biases(family: Family, model: nn.Module) -> None:
    """BitFit trains the base's biases, and the base computes what it does with these values."""
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    output, gradients = family.gradients(model, wanted)
    twin = copy.deepcopy(family.plain).requires_grad_(False)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in wanted.items():
            own[name].copy_(parameter)
    leaves = {name: own[name].requires_grad_() for name in wanted}
    expected, theirs = family.gradients(twin, leaves)
    _check_close("the output", output, expected, expected.norm().item())
    for name, gradient in gradients.items():
        if (gradient is None) != (theirs[name] is None):
            raise Wrong(f"the gradient of {name} is {gradient}")


def _check_prompt(family: Family, model: nn.Module) -> None:
    """Output and gradient are those of the base on the prompt's rows and the tokens' embeddings.
    Where the prompt has no positions among learned ones there is no such formula: docs/parity.md
    has these models."""
    stack = stacks_of(model)[0]
    if stack.prompt != PromptLayout():
        return
    ((name, prompt),) = (
        (n, p) for n, p in model.named_parameters() if n.endswith("embedding") and p.requires_grad
    )
    output, gradients = family.gradients(model, {name: prompt})
    twin = copy.deepcopy(family.plain).requires_grad_(False)
    leaf, ids = prompt.detach().clone().requires_grad_(), family.batch["input_ids"]
    tokens = base_of(twin).get_input_embeddings()(ids)
    rows = torch.cat([leaf.to(tokens.dtype).expand(len(ids), -1, -1), tokens], 1)
    batch = {**family.batch, "input_ids": None, "inputs_embeds": rows}
    expected = _first(base_of(twin)(**batch))
    if stack.kind == "decoder":  # else the decoder's output, which has no prompt
        expected = expected[:, len(leaf) :]
    loss = (expected * family.weights).sum() / expected.numel() ** 0.5
    (theirs,) = torch.autograd.grad(loss, [leaf])
    expected = expected.detach()
    _check_close("the output", output, expected, expected.norm().item())
    if (output - family.output).norm() < 1e-5 * family.output.norm():
        raise TooSmall("its effect on this tiny model is below fp32's rounding")
    _check_close(f"the gradient of {name}", gradients[name], theirs, theirs.norm().item())


def _check_training(family: Family, model: nn.Module) -> None:
    """In training mode, with the model's own dropouts, everything is finite."""
    model.train()
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    try:
        _, gradients = family.gradients(model, wanted)
    except Exception as error:
        raise Wrong(f"training mode: {type(error).__name__}: {error}") from error
    finally:
        model.eval()
    for name, gradient in gradients.items():
        if gradient is not None and not gradient.isfinite().all():
            raise Wrong(f"training mode: the gradient of {name} is not finite")
