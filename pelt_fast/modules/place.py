"""What runs where several methods have sites on one module of the model.

Rows are disjoint: a row under one method has no update of another. So the sites of unlike kinds at
one module run one around the other, each as the forward of its kind says, with the updates of all
its methods in one grouped op (:mod:`.routed_update`).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .adapter import ParallelAttentionAdapter, SequentialAdapter
from .ffn import (
    LayerAdapter,
    NormAdapter,
    ParallelFFNAdapter,
    ResidualFFNAdapter,
    SequentialFFNAdapter,
)
from .ffn_block import FFNBlock
from .frozen_module import FrozenModule
from .heads import MultiHeadAdapter
from .joined_projection import JoinedProjection
from .lora import LoRALinear
from .projection_view import JOINED
from .routed_update import RoutedUpdate, Sites, draws_of
from .routing import Routing
from .switch import Switch

Layer = Callable[..., Tensor]
IN_THE_BASE = (LoRALinear, JoinedProjection)  # sites that run with the frozen module


class Place:
    """Runs instead of a module on which methods have sites."""

    def __init__(self, module: nn.Module, routing: Routing, switch: Switch):
        self.frozen = FrozenModule(module)
        self.routing, self.switch = routing, switch
        self.calls: dict[int, list[Callable]] = {}  # of each method, the outermost last
        self.block: FFNBlock | None = None  # the block that the sites run instead of

    def put(self, method: int, call: Callable) -> None:
        """Add the call of a method's site."""
        self.calls.setdefault(method, []).append(call)
        site = getattr(call, "__self__", None)
        if isinstance(site, (SequentialFFNAdapter, ParallelFFNAdapter)):
            self.block = site.ffn

    def drop(self, method: int) -> None:
        """Forget a method."""
        self.calls.pop(method, None)

    def __call__(self, *args, **kwargs):
        routes = self.routing.now()
        if self.switch.any_block and self.switch.is_off():
            return self._base(*args, **kwargs)
        if routes.alone is not None:
            call = self._outermost(routes.alone)
            if call is None:
                return self._base(*args, **kwargs)
            with self.routing.seeds_of(routes.alone, draws_of(call.__self__)):
                return call(*args, **kwargs)
        return self._mixed(RoutedUpdate(self.routing, routes))(*args, **kwargs)

    def _outermost(self, method: int) -> Callable | None:
        """The call of a method's outermost site. None where it has none, or LoRA alone inside of a
        block: the base runs that."""
        calls = self.calls.get(method, [])
        if self.block is not None:
            calls = [call for call in calls if not isinstance(call.__self__, IN_THE_BASE)]
        return calls[-1] if calls else None

    def _base(self, *args, **kwargs):
        """What runs inside of every site: the frozen block, or the module with the LoRA on it."""
        if self.block is not None:
            return self.block(*args, **kwargs)
        joined = self.frozen.module._modules.get(JOINED)
        return self.frozen(*args, **kwargs) if joined is None else joined(*args, **kwargs)

    def _mixed(self, update: RoutedUpdate) -> Layer:
        """The module with the sites of every method around it."""
        by_kind: dict[Callable, Sites] = {}
        for method, calls in sorted(self.calls.items()):
            if not self.routing.may_act(method, update.routes):
                continue
            for call in calls:
                site = call.__self__
                if not isinstance(site, IN_THE_BASE):
                    by_kind.setdefault(_kind_of(site), {})[method] = site
        inner = self._base
        before = by_kind.pop(_before_dropout, None)
        if before is not None:
            inner = partial(_before_dropout, update, before, self.block)
        for kind, sites in by_kind.items():
            inner = partial(kind, update, sites, inner)
        return inner


def _kind_of(site: nn.Module) -> Callable:
    """The function that runs sites of this kind around what is inside of them."""
    if isinstance(site, ParallelFFNAdapter):
        if site.before_dropout:
            return _before_dropout
        return _residual_ffn if isinstance(site, ResidualFFNAdapter) else _parallel_ffn
    if isinstance(site, ParallelAttentionAdapter):
        return _before_output if site.before_output else _after_output
    return _KINDS[type(site)]


def _sequential(update: RoutedUpdate, sites: Sites, inner: Layer, *args, **kwargs):
    """adapter(module(x)); a layer may return more than its output."""
    out = inner(*args, **kwargs)
    if isinstance(out, tuple):
        return update(sites, out[0], out[0], sequential=True), *out[1:]
    return update(sites, out, out, sequential=True)


def _around_norm(update: RoutedUpdate, sites: Sites, inner: Layer, z: Tensor) -> Tensor:
    """LN(z + Δ(LN(z)))."""
    return inner(update(sites, z, inner(z)))


def _before_output(update: RoutedUpdate, sites: Sites, inner: Layer, heads: Tensor) -> Tensor:
    """linear(heads + Δ(x)), x the attention's input."""
    return inner(update(sites, heads, _taken(sites)))


def _after_output(update: RoutedUpdate, sites: Sites, inner: Layer, heads: Tensor) -> Tensor:
    """linear(heads) + Δ(x)."""
    x = _taken(sites)
    return update(sites, inner(heads), x)


def _heads(update: RoutedUpdate, sites: Sites, inner: Layer, heads: Tensor) -> Tensor:
    """linear(heads + Δ(x) by head)."""
    return inner(update.of_heads(sites, heads, _taken(sites)))


def _parallel_ffn(update: RoutedUpdate, sites: Sites, inner: Layer, x: Tensor) -> Tensor:
    """ffn(x) + Δ(x)."""
    return update(sites, inner, x)


def _residual_ffn(update: RoutedUpdate, sites: Sites, inner: Layer, x: Tensor) -> Tensor:
    """ffn(norm(x)) + Δ(x), x the residual stream."""
    stream = _taken(sites)
    return update(sites, inner(x), stream)


def _before_dropout(update: RoutedUpdate, sites: Sites, block: FFNBlock, x: Tensor) -> Tensor:
    """drop(ffn(x) + Δ(x)), the block without its output dropout."""
    read, sites = x, dict(sites)
    residual = {m: s for m, s in sites.items() if isinstance(s, ResidualFFNAdapter)}
    y = block(x, False)
    if residual:
        y = update(residual, y, _taken(residual))
    plain = {m: s for m, s in sites.items() if m not in residual}
    return block.output_dropout(update(plain, y, read) if plain else y)


def _taken(sites: Sites) -> Tensor:
    """The input that the sites' hooks kept. Every hook kept the same one, and none keeps it on."""
    first, *_ = [site.kept_input.take() for site in sites.values()]
    return first


_KINDS: dict[type, Callable] = {
    SequentialAdapter: _sequential,
    SequentialFFNAdapter: _sequential,
    LayerAdapter: _sequential,
    NormAdapter: _around_norm,
    MultiHeadAdapter: _heads,
}
