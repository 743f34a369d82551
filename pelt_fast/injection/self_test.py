"""The self-test of a layout: with an update of zero, a model computes what its base does.

A tiny batch (two sentences, images or sounds) goes through the base before a method is built, and
again after. The first layer of each kind is compared, in evaluation mode (``zero_update``) and in
training mode (``expected_dropout``). Weights, buffers, modes and random states are left as they
were. Only rounding errors are allowed: measured against a layer's whole output, in its own dtype.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pelt_fast.layouts.layout import FFNLayout, StackLayout
from pelt_fast.layouts.lookup import base_of, find, layers_of
from pelt_fast.layouts.unnamed import unnamed_dropouts, unnamed_in_layer
from pelt_fast.modules.projection_view import host_of

from .expected_dropout import ExpectedDropout
from .record import Site
from .rounding import is_off, relative_error
from .synthetic_batch import synthetic_batch, why_no_run
from .unchanged import unchanged
from .zero_update import zero_update

logger = logging.getLogger("pelt_fast")


class SelfTest:
    """What a model computes before a method is built into it; ``check`` compares afterwards."""

    def __init__(self, model: nn.Module, stacks: list[StackLayout], strict: bool = False):
        """``strict``: every layer is compared, and a model that cannot be run is refused."""
        self.model, self.base, self.strict = model, base_of(model), strict
        self.layers = dict(_layers_of_each_kind(self.base, stacks, strict))
        self.why_not = why_no_run(self.base)
        self.before: dict[bool, dict[str, Tensor]] = {}
        self.wrong_norms: list[str] = []  # the errors in the norms that the layout names
        if self.why_not is None:
            self._capture()

    def _capture(self) -> None:
        try:
            self.batch = synthetic_batch(self.base)
            self.before = {training: self._run(training) for training in (False, True)}
            with self._norms_read() as tensors:
                again = {False: self._run(False)}
            self.wrong_norms = self._wrong_norms(tensors)
            again[True] = self._run(True)
        except Exception as error:  # a model may raise any error on an unsuitable input
            self.why_not = f"the base does not run on it ({type(error).__name__}: {error})"
            return
        for training, outputs in self.before.items():
            missing = sorted(set(self.layers) - set(outputs))
            if missing:
                self.why_not = f"the base does not run {', '.join(missing[:3])} on it"
            elif any(is_off(outputs[n], again[training][n]) for n in outputs):
                self.why_not = "the base gives another answer each time"

    def check(self, sites: list[Site]) -> None:
        """ValueError where the method with a zero update is not the base. The message names the
        layer, the size of the error, and parts that the layout may have left out."""
        if self.why_not is not None and self.strict:
            raise ValueError(f"the layout that was found could not be proved: {self.why_not}")
        if self.why_not is not None:
            logger.warning(
                "the self-test of this row could not run: %s. Compare the model with an update of"
                " zero with the base yourself", self.why_not,
            )  # fmt: skip
            return
        kind = type(self.model).__name__
        if self.wrong_norms:
            raise ValueError(f"the layout does not describe this {kind}: {self.wrong_norms[0]}")
        for training in (False, True):
            with zero_update(sites, training):
                try:
                    after = self._run(training)
                except Exception as error:
                    raise ValueError(
                        f"the layout does not describe this {kind}: it runs without the method, and"
                        f" with it fails ({type(error).__name__}: {error})"
                    ) from error
            self._compare(after, training)

    def _compare(self, after: dict[str, Tensor], training: bool) -> None:
        for name, before in self.before[training].items():
            output = after.get(name)
            if output is None or is_off(before, output):
                error = torch.inf if output is None else relative_error(before, output)
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

    def _with_norm(self) -> list[tuple[str, nn.Module, FFNLayout]]:
        """The compared layers whose layout names the norm of their block."""
        return [(name, layer, stack.ffn) for name, (stack, layer) in self.layers.items()
                if stack.ffn is not None and stack.ffn.norm is not None]  # fmt: skip

    @contextlib.contextmanager
    def _norms_read(self) -> Iterator[dict[str, Tensor]]:
        """In this block what the norms give, and what their blocks read, is kept by name."""
        tensors: dict[str, Tensor] = {}

        def keep(key: str, output: bool):
            def hook(module, args, kwargs, *outputs):
                tensors[key] = outputs[0] if output else (*args, *kwargs.values())[0]

            return hook

        with contextlib.ExitStack() as guards:
            for name, layer, layout in self._with_norm():
                norm, entry = find(layer, layout.norm), host_of(find(layer, layout.entry))
                for handle in (
                    norm.register_forward_hook(keep(f"{name} out", True), with_kwargs=True),
                    entry.register_forward_pre_hook(keep(f"{name} in", False), with_kwargs=True),
                ):
                    guards.callback(handle.remove)
            yield tensors

    def _wrong_norms(self, tensors: dict[str, Tensor]) -> list[str]:
        """The blocks whose input is not the output of the norm that the layout names: an adapter
        that reads the stream before that norm would read the wrong tensor."""
        return [
            f"{name}.{layout.entry} does not read what {layout.norm} gives"
            for name, _, layout in self._with_norm()
            if not _same(tensors.get(f"{name} out"), tensors.get(f"{name} in"))
        ]

    @torch.no_grad()
    def _run(self, training: bool) -> dict[str, Tensor]:
        """The outputs of the layers that are compared, by name."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str):
            def hook(layer, args, output):
                first = output[0] if isinstance(output, (tuple, list)) else output
                outputs.setdefault(name, first.detach().clone())
                if len(outputs) == len(self.layers):
                    raise _Finished

            return hook

        with contextlib.ExitStack() as guards:
            guards.enter_context(torch.compiler.set_stance("force_eager"))  # hooks see each call
            guards.enter_context(unchanged(self.model, training))
            for name, (_, layer) in self.layers.items():
                guards.callback(layer.register_forward_hook(keep(name)).remove)
            if training:
                guards.enter_context(ExpectedDropout())
            with contextlib.suppress(_Finished):
                self.base(**self.batch)
        return outputs


class _Finished(Exception):
    """The last layer that is compared has run."""


def _layers_of_each_kind(
    base: nn.Module, stacks: list[StackLayout], every: bool
) -> Iterator[tuple[str, tuple[StackLayout, nn.Module]]]:
    """The first layer of each kind in each stack, or every layer, by name."""
    for stack in stacks:
        kinds = set()
        for index, layer in layers_of(base, stack):
            kind = _kind(layer)
            if every or kind not in kinds:
                kinds.add(kind)
                yield f"{stack.layers}.{index}", (stack, layer)


def _kind(layer: nn.Module) -> tuple:
    """Equal for layers that are built and configured alike."""
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
