"""The ``pelt_fast::`` op library: schemas, what each device runs, and the autograd Functions.

Every op is defined once. Its reference is registered under CompositeExplicitAutograd: it runs on
each device without its own implementation. The ``cpu`` and ``gpu`` files are registered under CPU
and CUDA.
An implementation returns NotImplemented for an input that it does not take, or that another one
runs faster. The next one then runs, in the order gpu, cpu, reference. Autograd and torch.compile
do not look inside an op; its Function computes the gradients.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pelt_fast import env

from . import dispatch
from .bundles import absent, flat_fields, from_flat, parameter_types, schema_of

_LIBRARY = torch.library.Library("pelt_fast", "DEF")
_TENSORS = (Tensor, Tensor | None)
OF_THE_DEVICE = ("auto", "cpp")  # the backends that the device of the tensors chooses for
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
OPS: dict[str, "Op"] = {}  # by name, of the folders that were imported


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor`` (never for meta tensors)."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch's dispatcher would only call an op of these tensors: nothing traces, counts,
    profiles or transforms, and all are plain."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


class Op:
    """One op. A call runs the implementation of the current backend. All methods take flat
    arguments, in the order of the reference's bundles.

    Args:
        name: its name in ``torch.ops.pelt_fast``.
        reference: the specification, a function of bundles.
        fake: returns the shapes and dtypes of the result, from the same arguments.
    """

    def __init__(self, name: str, reference: Callable, fake: Callable):
        self.name = name
        OPS[name] = self
        fields = flat_fields(reference)
        self.arguments = tuple(fields)
        self.tensors = [i for i, kind in enumerate(fields.values()) if kind in _TENSORS]
        self.reference = from_flat(reference)
        self.cpu = self.gpu = self.reference
        _LIBRARY.define(f"{name}{schema_of(reference)}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self.reference, "CompositeExplicitAutograd")
        shapes = from_flat(fake, parameter_types(reference))
        torch.library.register_fake(f"pelt_fast::{name}", shapes, lib=_LIBRARY)
        self.dispatched = getattr(torch.ops.pelt_fast, name).default

    def on_cpu(self, function: Callable, otherwise: Callable | None = None) -> None:
        """Register what a CPU runs, and what runs on other inputs (by default the reference)."""
        first = from_flat(function)
        last = self.reference if otherwise is None else from_flat(otherwise)

        def run(*args):
            result = first(*args)
            return last(*args) if result is NotImplemented else result

        self.cpu = run
        _LIBRARY.impl(self.name, run, "CPU")

    def on_gpu(
        self,
        path: str,
        kernels: str,
        *,
        size: tuple[str, int | None] | None,
        any_strides: Sequence[str] = (),
        without: Callable | None = None,
    ) -> None:
        """Register what a GPU runs.

        Args:
            path: "module:function", imported (and Triton with it) on the first call.
            kernels: the name whose rules ``dispatch.unsupported`` checks.
            size: the argument and the dim whose length is the rank or the prefix length, or None
                instead of the dim if the argument is a list of them; None if the op has neither.
            any_strides: weights that only GEMMs read (GPT-2 stores them transposed).
            without: what runs if the kernels cannot, ``cpu`` by default. The reason is logged
                once, or raised under strict.
        """
        length_of = _length_of(self.arguments, size)
        free = {self.arguments.index(name) for name in any_strides}
        otherwise = self.cpu if without is None else from_flat(without)
        loaded: list[Callable] = []

        def run(*args):
            tensors = [
                _upright(args[i]) if i in free else args[i]
                for i in self.tensors if args[i] is not None
            ]  # fmt: skip
            reason = dispatch.unsupported(kernels, tensors, length_of(args))
            if reason is not None:
                dispatch.fall_back(f"{kernels}: running on library kernels, because {reason}")
                return otherwise(*args)
            if not loaded:
                module, name = path.split(":")
                loaded.append(from_flat(getattr(importlib.import_module(module), name)))
            with _current_device(tensors[0]):
                result = loaded[0](*args)
            return self.cpu(*args) if result is NotImplemented else result

        self.gpu = run
        _LIBRARY.impl(self.name, run, "CUDA")

    def __call__(self, *args, backend: str):
        if backend not in OF_THE_DEVICE or torch._C._is_any_autocast_enabled():
            return self._run(args, backend)
        return self._dispatch(args)

    def _run(self, args: tuple, backend: str):
        """What a named backend runs, without autocast."""
        if autocasts(args[0]):
            # the op chooses its own dtypes: autocast has acted on its arguments already
            with torch.autocast(args[0].device.type, enabled=False):
                return self._run(args, backend)
        if backend == "reference":
            return self.reference(*args)
        if backend == "triton" and env.interpret():
            return self.gpu(*args)
        if backend == "cuda":
            with dispatch.cuda_kernels():
                return self._dispatch(args)
        return self._dispatch(args)

    def _dispatch(self, args: tuple):
        """Run the implementation for the device of the first argument: directly, or through torch's
        dispatcher if other code must see the op."""
        if not is_plain([args[i] for i in self.tensors]):
            return self.dispatched(*args)
        x = args[0]
        if x.is_cpu:
            return self.cpu(*args)
        return self.gpu(*args) if x.is_cuda else self.dispatched(*args)


def _length_of(
    arguments: Sequence[str], size: tuple[str, int | None] | None
) -> Callable[[tuple], int]:
    """The rank or prefix length of an op's arguments (:meth:`Op.on_gpu`)."""
    if size is None:
        return lambda args: 1
    index, dim = arguments.index(size[0]), size[1]
    if dim is None:
        return lambda args: max((1, *args[index]))
    return lambda args: args[index].shape[dim]


_NOTHING_TO_DO = contextlib.nullcontext()


def _current_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensors' device the current one, because Triton launches there."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device_of(tensor)


def _upright(weight: Tensor) -> Tensor:
    """A matrix that is stored transposed, transposed back."""
    return weight.t() if weight.dim() == 2 and weight.stride(0) == 1 else weight


def fake_gradients(
    dy: Tensor, kinds: Sequence[tuple[Sequence[int], torch.dtype]], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Uninitialised gradients of these shapes and dtypes; an empty tensor for a gradient that
    is not requested."""
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else absent(dy)
        for (shape, dtype), need in zip(kinds, needs, strict=True)
    )


def keep_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The requested gradients, None for the others."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class OpFunction(torch.autograd.Function):
    """A Function whose op can also run without the tensors for a backward.

    ``infer`` takes the arguments of ``forward`` and returns the output. It saves nothing and does
    not compute tensors that only a backward reads.
    """

    @staticmethod
    def infer(*args) -> Tensor:
        raise NotImplementedError


def run(function: type[OpFunction], *args) -> Tensor:
    """``function`` of ``args``, differentiable if a gradient may be requested."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return function.apply(*args)
    return function.infer(*args)
