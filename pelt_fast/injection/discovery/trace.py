"""One forward of a few tokens, written down: which module was called when, with what, and what the
attention function was given."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from pelt_fast.layouts.names import modules_of
from pelt_fast.modules.per_thread import PerThread
from pelt_fast.modules.projection_view import is_linear

from .. import attention_interface as interface
from ..own_configs import CHOICE
from ..synthetic_batch import synthetic_batch
from .computed import Computed, Tell, seen_by

_NAME = "pelt_fast_spied_{}"


@dataclass(eq=False)
class Call:
    """One call of a module: its first tensor, and the first tensor that it returned."""

    path: str
    module: nn.Module
    began: int
    ended: int
    input: Tensor | None
    output: Tensor | None
    node: object = None  # of autograd: what made the output

    @property
    def is_linear(self) -> bool:
        """Whether the module multiplies by one matrix, and was called with a tensor."""
        known = is_linear(self.module) or isinstance(self.module, Conv1D)
        return known and self.input is not None and self.node is not None


@dataclass(eq=False)
class Attended:
    """One attention: its module, its tensors, and what made its result. ``heads`` are those of the
    keys and their size, where the attention interface was asked; else None."""

    module: nn.Module
    at: int
    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    node: object
    heads: tuple[int, int] | None = None
    why_no_prefix: str = "its module computes its attention itself"
    lengths: tuple[int, int] | None = None  # queries and keys
    biases: tuple[Tensor, ...] = ()  # on the scores, those that are computed


@dataclass(eq=False)
class Trace:
    """What one forward did, in order."""

    calls: list[Call] = field(default_factory=list)  # in the order in which they ended
    attended: list[Attended] = field(default_factory=list)
    clock: int = 0
    running: list[nn.Module] = field(default_factory=list)  # the modules, the innermost last
    computed: Computed | None = None

    def tick(self) -> int:
        """The next moment."""
        self.clock += 1
        return self.clock

    @functools.cached_property
    def by_path(self) -> dict[str, list[Call]]:
        """The calls of each module; read when the forward has ended."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.path, []).append(call)
        return found


_now = PerThread()  # the trace that runs in this thread


def trace(base: nn.Module) -> Trace:
    """Run ``base`` once, with autograd. Called in a block of ``unchanged``. Raises what the model
    raises."""
    batch, found = synthetic_batch(base), Trace()
    with contextlib.ExitStack() as guards:
        guards.enter_context(_with_gradients(base))
        guards.enter_context(_spied(base))
        guards.enter_context(torch.compiler.set_stance("force_eager"))
        for path, module in modules_of(base).items():
            for handle in _hooks(module, path, found):
                guards.callback(handle.remove)
        _now.put(found)
        guards.callback(_now.put, None)
        found.computed = guards.enter_context(Computed(_teller(found)))
        with torch.enable_grad():
            base(**batch)
    return found


def _teller(found: Trace) -> Tell:
    """Writes down an attention that the running module computes itself."""

    def tell(query, key, value, output, weights, causal) -> None:
        causal = causal or (weights is not None and not _sees_later(weights != 0))
        at, module = found.tick(), found.running[-1]
        found.attended.append(Attended(module, at, query, key, value, causal, output.grad_fn))

    return tell


def _hooks(module: nn.Module, path: str, found: Trace) -> Iterator:
    began: list[int] = []

    def before(*_) -> None:
        found.running.append(module)
        began.append(found.tick())

    def after(module, args, kwargs, output) -> None:
        found.running.pop()
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        output = _first(output)
        node = None if output is None else output.grad_fn
        call = Call(path, module, began.pop(), found.tick(), _first(given), output, node)
        found.calls.append(call)

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after, with_kwargs=True)


def _first(value) -> Tensor | None:
    """The first floating-point tensor of a value."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if hasattr(value, "values") and not isinstance(value, (nn.Module, type)):
        value = tuple(value.values()) if callable(value.values) else ()
    if isinstance(value, (tuple, list)):
        return next((found for each in value if (found := _first(each)) is not None), None)
    return None


@contextlib.contextmanager
def _with_gradients(base: nn.Module) -> Iterator[None]:
    """In this block autograd follows every floating-point parameter."""
    before = [(p, p.requires_grad) for p in base.parameters()]
    for parameter, _ in before:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _spied(base: nn.Module) -> Iterator[None]:
    """In this block the attention function writes down what it is given."""
    configs = {id(c): c for m in base.modules() for c in vars(m).values()
               if isinstance(c, PreTrainedConfig)}  # fmt: skip
    before = [(c, getattr(c, CHOICE, None)) for c in configs.values()]
    for config, choice in before:
        setattr(config, CHOICE, _NAME.format("eager" if choice in (None, "eager") else "sdpa"))
    try:
        yield
    finally:
        for config, choice in before:
            setattr(config, CHOICE, choice)


def _spy(function):
    def attend(module, query, key, value, attention_mask, *args, **kwargs):
        found = _now.get()
        if found is None:  # another thread, or a model that shares a config
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        found.computed.is_paused = True
        output = function(module, query, key, value, attention_mask, *args, **kwargs)
        found.computed.is_paused = False
        causal = _is_causal(module, attention_mask, kwargs.get("is_causal"))
        why = _why_no_prefix(key, value)
        biases = (attention_mask, kwargs.get("position_bias"))
        found.attended.append(Attended(
            module, found.tick(), query, key, value, causal, output[0].grad_fn,
            heads=None if why else (key.shape[1], key.shape[3]), why_no_prefix=why,
            lengths=(query.shape[2], key.shape[2]),
            biases=tuple(bias for bias in biases if bias is not None and bias.requires_grad),
        ))  # fmt: skip
        return output

    return attend


def _why_no_prefix(key: Tensor, value: Tensor) -> str:
    """Why keys and values cannot have a prefix in front, or ""."""
    if key.shape[1] != value.shape[1] or key.shape[3] != value.shape[3]:
        return f"its keys {tuple(key.shape)} and values {tuple(value.shape)} have other sizes"
    return ""


def _is_causal(module: nn.Module, mask: Tensor | None, given: bool | None) -> bool:
    """Whether a query sees no later key."""
    if mask is None or mask.dim() != 4 or mask.shape[-1] < 2:
        return bool(getattr(module, "is_causal", True) if given is None else given)
    return not _sees_later(seen_by(mask))


def _sees_later(seen: Tensor) -> bool:
    """Whether a query sees a later key."""
    later = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).triu(1)
    return bool((seen & later).any())


for _choice in interface.WRAPPED:
    ALL_ATTENTION_FUNCTIONS.register(_NAME.format(_choice), _spy(getattr(interface, _choice)))
    ALL_MASK_ATTENTION_FUNCTIONS.register(
        _NAME.format(_choice), ALL_MASK_ATTENTION_FUNCTIONS[_choice]
    )
