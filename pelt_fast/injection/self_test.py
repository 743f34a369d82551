"""The self-test of a row: with an update of zero a model computes what it did without the method.

Two tiny sentences (or images, or sounds) go through the base, before a method is built and after,
as far as the last of the layers that differ from each other. The updates are zeroed: second factors
are, a prefix is keys whose values are zero, a prompt has no tokens. In evaluation mode the sites
run what they always run. In training mode every dropout multiplies by about 1 - p instead of
drawing a mask, so that one that is lost, or stands elsewhere, changes the numbers; a widened FFN,
whose masks its op would draw, runs as its block alone then. Weights, buffers, modes and random
states are left as they were.

A rounding error is what may differ: measured against a layer's whole output, in its own dtype.
"""

import contextlib
import logging
import random
from collections.abc import Iterator

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import base_of, find
from pelt_fast.layouts.unnamed import unnamed_dropouts, unnamed_in_layer
from pelt_fast.modules import ParallelFFNAdapter, PrefixBank, Prompt
from pelt_fast.modules.projection_view import host_of

from .attention_interface import SLICE
from .record import Injection
from .synthetic_batch import synthetic_batch, why_no_run

logger = logging.getLogger("pelt_fast")

# rounding errors of a layer, as multiples of eps: sums of many terms, and few roundings of 16 bits
_ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
_UPDATES = ("lora_b", "up_weight", "up_bias")  # what an update of zero has zeros in
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)
_DRAWS = (torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.Tensor.uniform_,
          torch.Tensor.normal_)  # fmt: skip
_CHANCES = (torch.bernoulli, torch.Tensor.bernoulli)


class SelfTest:
    """What a model computes before a method is built in it; ``check`` compares afterwards."""

    def __init__(self, model: nn.Module, stacks: list[StackLayout]):
        self.model, self.base = model, base_of(model)
        self.layers = dict(_unlike_layers(self.base, stacks))
        self.why_not = why_no_run(self.base)
        self.before: dict[bool, dict[str, Tensor]] = {}
        self.astray: list[str] = []  # what is wrong with the norms that the row names
        if self.why_not is None:
            self._capture()

    def _capture(self) -> None:
        try:
            self.batch = synthetic_batch(self.base)
            self.before = {training: self._run(training) for training in (False, True)}
            self.astray = self._norms_astray()
            again = {training: self._run(training) for training in (False, True)}
        except Exception as error:  # whatever a model of any kind says to an input that is not its
            self.why_not = f"the base does not run on it ({type(error).__name__}: {error})"
            return
        for training, outputs in self.before.items():
            missing = sorted(set(self.layers) - set(outputs))
            if missing:
                self.why_not = f"the base does not run {', '.join(missing[:3])} on it"
            elif any(not torch.equal(outputs[n], again[training][n]) for n in outputs):
                self.why_not = "the base gives another answer each time"

    def check(self, injection: Injection) -> None:
        """ValueError with the layer, the size of the error and what may be missing, where the
        method with a zero update is not the base."""
        if self.why_not is not None:
            logger.warning(
                "the self-test of this row could not run: %s. Compare the model with an update of"
                " zero with the base yourself", self.why_not,
            )  # fmt: skip
            return
        if self.astray:
            raise ValueError(
                f"the layout does not describe this {type(self.model).__name__}: {self.astray[0]}"
            )
        for training in (False, True):
            with _zero_update(injection, training):
                try:
                    after = self._run(training)
                except Exception as error:
                    raise ValueError(
                        f"the layout does not describe this {type(self.model).__name__}: it runs"
                        f" without the method, and with it fails ({type(error).__name__}: {error})"
                    ) from error
            self._compare(after, training)

    def _compare(self, after: dict[str, Tensor], training: bool) -> None:
        for name, before in self.before[training].items():
            found = after.get(name)
            error = torch.inf if found is None else _error(before, found)
            if error > _ROUNDINGS.get(before.dtype, 64) * _eps(before):
                raise ValueError(self._message(name, error, training))

    def _message(self, name: str, error: float, training: bool) -> str:
        stack, layer = self.layers[name]
        unnamed = (unnamed_dropouts if training else unnamed_in_layer)(layer, stack)
        listed = ", ".join(unnamed[:8]) or "nothing: a factor, or a step that is no module"
        mode = "training mode (dropouts)" if training else "evaluation mode"
        return (
            f"the layout does not describe this {type(self.model).__name__}: with an update of zero"
            f" {name} is off by {error:.2g} of its output in {mode}. In it no layout names:"
            f" {listed}. Name what belongs to the block, or put the method elsewhere"
        )

    def _norms_astray(self) -> list[str]:
        """Where a block does not read what the norm named for it gives: an adapter that reads the
        stream in front of that norm would read another one."""
        seen: dict[str, Tensor] = {}
        pairs = [(name, layer, stack.ffn) for name, (stack, layer) in self.layers.items()
                 if stack.ffn is not None and stack.ffn.norm is not None]  # fmt: skip

        def keep(key: str, output: bool):
            def hook(module, args, kwargs, *outputs):
                seen[key] = outputs[0] if output else (*args, *kwargs.values())[0]

            return hook

        with contextlib.ExitStack() as guards:
            for name, layer, layout in pairs:
                norm, entry = find(layer, layout.norm), host_of(find(layer, layout.entry))
                for handle in (
                    norm.register_forward_hook(keep(f"{name} out", True), with_kwargs=True),
                    entry.register_forward_pre_hook(keep(f"{name} in", False), with_kwargs=True),
                ):
                    guards.callback(handle.remove)
            self._run(False)
        return [
            f"{name}.{layout.entry} does not read what {layout.norm} gives"
            for name, _, layout in pairs
            if not _same(seen.get(f"{name} out"), seen.get(f"{name} in"))
        ]

    @torch.no_grad()
    def _run(self, training: bool) -> dict[str, Tensor]:
        """The layers' outputs, by name."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str):
            def hook(layer, args, output):
                first = output[0] if isinstance(output, (tuple, list)) else output
                outputs.setdefault(name, first.detach().clone())
                if len(outputs) == len(self.layers):
                    raise _Enough

            return hook

        with contextlib.ExitStack() as guards:
            guards.enter_context(_untouched(self.model, training))
            for name, (_, layer) in self.layers.items():
                guards.callback(layer.register_forward_hook(keep(name)).remove)
            if training:
                guards.enter_context(_Expected())
            with contextlib.suppress(_Enough):
                self.base(**self.batch)
        return outputs


class _Enough(Exception):
    """The last layer that is compared has run."""


class _Expected(TorchFunctionMode):
    """Puts in the place of each draw what it is worth: a dropout multiplies by 1 - p, a little more
    or less by channel, which tells its probability and its place; a uniform number is a half."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return _dropped(*args, **kwargs)
        if function in _DRAWS:
            return function(*args, **kwargs).fill_(0.5)
        if function in _CHANCES:
            return args[0].clone()
        if function is F.scaled_dot_product_attention:
            return _attended(*args, **kwargs)
        return function(*args, **kwargs)


def _dropped(input, p=0.5, training=True, inplace=False, train=None):
    if not (training if train is None else train):
        return input
    place = torch.arange(input.shape[-1], device=input.device, dtype=torch.float64)
    keep = (1 - p * (1 + 0.5 * torch.cos(place))).to(input.dtype)
    return input.mul_(keep) if inplace else input * keep


def _attended(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, *args, **kwargs)
    return out * (1 - dropout_p)


class _Nothing:
    """In the place of a prefix: one key that adds nothing to what the attention gives."""

    on, composition = True, "add"

    def __init__(self, site: nn.Module, form: str):
        self.form, like = form, next(site.parameters())
        heads, _, dim = site.shape[2:] if isinstance(site, PrefixBank) else site.down_weight.shape
        self.zeros = like.new_zeros(heads, 1, dim)

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        return self.zeros, self.zeros


@contextlib.contextmanager
def _zero_update(injection: Injection, training: bool) -> Iterator[None]:
    """Let every site of a model add nothing, in evaluation mode through what it always runs."""
    with contextlib.ExitStack() as guards:
        for module in dict.fromkeys(site.module for site in injection.sites):
            _zero_tensors(module, guards)
            if getattr(module, "residual", True) is False:
                _let(module, "residual", True, guards)
            alone = isinstance(module, ParallelFFNAdapter)
            if alone and (training or module.why_not_fused() is not None):
                _let(module, "merged", True, guards)
        for site in injection.sites:
            module = site.details.get("attention")
            if module is not None:
                own = module.__dict__[SLICE]
                none = None if training else _Nothing(site.module, own.form)
                _let(module, SLICE, none, guards)
        yield


@torch.no_grad()
def _zero_tensors(module: nn.Module, guards: contextlib.ExitStack) -> None:
    if isinstance(module, Prompt):
        nothing = nn.Parameter(module.embedding.detach()[:0], module.embedding.requires_grad)
        _let(module, "embedding", nothing, guards)
    names = _UPDATES if getattr(module, "layer_norm", "") != "out" else (*_UPDATES, "norm_bias")
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is not None:
            guards.callback(_write, tensor, tensor.detach().clone())
            tensor.zero_()


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


def _let(owner, name: str, value, guards: contextlib.ExitStack) -> None:
    """Set an attribute until the guards are closed."""
    there, before = name in vars(owner), getattr(owner, name)
    put_back = (setattr, owner, name, before) if there or name in owner._parameters else (
        delattr, owner, name
    )  # fmt: skip
    guards.callback(*put_back)
    setattr(owner, name, value)


@contextlib.contextmanager
def _untouched(model: nn.Module, training: bool) -> Iterator[None]:
    """A mode for every module; afterwards modes, buffers and random states as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    states = random.getstate(), numpy.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        for module in modes:
            module.training = training
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            for module, mode in modes.items():
                module.training = mode
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _unlike_layers(
    base: nn.Module, stacks: list[StackLayout]
) -> Iterator[tuple[str, tuple[StackLayout, nn.Module]]]:
    """The first of each kind of layer in each stack, by name."""
    for stack in stacks:
        kinds = set()
        for index, layer in enumerate(find(base, stack.layers)):
            kind = _kind(layer)
            if kind not in kinds:
                kinds.add(kind)
                yield f"{stack.layers}.{index}", (stack, layer)


def _kind(layer: nn.Module) -> tuple:
    """What tells layers apart that are laid out in different ways."""
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    shapes = tuple(parameter.shape for parameter in layer.parameters())
    flags = tuple(
        (name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
        and not any(part in name for part in ("idx", "index", "layer", "training"))
    )
    return modules, shapes, flags


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and torch.equal(one, two)


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _error(before: Tensor, after: Tensor) -> float:
    """The error's norm as a part of the output's; infinite for another shape or no number."""
    if before.shape != after.shape:
        return torch.inf
    error = (after.double() - before.double()).norm() / before.double().norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else torch.inf
