"""Which method acts on each row of a batch: the routes of the forwards of one thread."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from pelt_fast.ops.common.bundles import Segments
from pelt_fast.ops.common.dropout import draw_seed, drops, seeds_from
from pelt_fast.ops.routed.segments import segments_of

from .checkpointed import in_checkpoint, run_again_in
from .gate import Gate
from .per_thread import PerThread
from .switch import RunsEagerly

NONE = -1  # the id of the base alone


class Routes:
    """The method of each row of a batch.

    A tensor whose leading dim is a multiple k B of the rows B has k neighbours for each row: beams,
    returned sequences, or the tokens of a row.

    Args:
        methods: (B) int64, the id of each row's method, ``NONE`` for the base alone.
        lengths: of a padding-free batch, the number of tokens of each of its B sequences.
    """

    def __init__(self, methods: Tensor, lengths: Tensor | None = None):
        self.methods, self.lengths = methods, lengths
        self.single = _single(methods)
        self._tables: dict = {}
        self._version = methods._version

    @property
    def alone(self) -> int | None:
        """The one method that a forward computes: that of all rows, if there is one. Where several
        processes train there is none, because DDP waits for the gradients of every method."""
        return None if needs_every_gradient() else self.single

    def of(self, rows: int, device: torch.device) -> Tensor:
        """The methods of the ``rows`` leading entries of a tensor, (rows) int64 on ``device``."""
        return self._table(("of", rows, device), lambda: self._spread(rows).to(device))

    def segments(self, rows: int, ranks: Sequence[int], device: torch.device) -> Segments:
        """Where a matrix of ``rows`` rows runs which method, for methods of these ranks."""
        key = ("segments", rows, tuple(ranks), device)
        return self._table(key, lambda: self._segments(rows, ranks, device))

    @property
    def present(self) -> set[int] | None:
        """The methods of the rows; None if the host does not know them."""
        if self.methods.device.type != "cpu":
            return None
        return self._table(("present",), lambda: set(self.methods.tolist()))

    def put(self, method: int, y: Tensor, compute: Callable[[Tensor | slice], Tensor]) -> Tensor:
        """y, with ``compute(rows)`` in the rows under a method. Where a CUDA graph is captured the
        host cannot ask which rows these are: all are computed, and the method's are taken."""
        if capturing():
            own = (self.of(y.shape[0], y.device) == method).view(-1, *[1] * (y.dim() - 1))
            return torch.where(own, compute(slice(None)), y)
        rows = self.rows(method, y.shape[0], y.device)
        if not rows.numel() and not needs_every_gradient():
            return y
        return y.index_copy(0, rows, compute(rows))

    def rows(self, method: int, rows: int, device: torch.device) -> Tensor:
        """The indices of the leading entries that are under a method."""
        found = self._table(("rows", method, rows, device),
                            lambda: (self._spread(rows) == method).nonzero()[:, 0])  # fmt: skip
        return found.to(device)

    def begin(self, rows: int | None) -> None:
        """A forward of a batch of ``rows`` rows begins; None: they are not known. A graph that is
        recorded must make its tables itself."""
        if self.methods.device.type != "cpu":
            self._tables.clear()
        if not torch.compiler.is_compiling():
            self._read_again()
        if rows is not None and self.single is None and self.lengths is None:
            self.check(rows)

    def _read_again(self) -> None:
        """Read the methods again where they were written in place since."""
        if self.methods._version != self._version:
            self._tables.clear()
            self._version, self.single = self.methods._version, _single(self.methods)

    def _table(self, key: tuple, make):
        self._read_again()
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = make()
        return found

    def _segments(self, rows: int, ranks: Sequence[int], device: torch.device) -> Segments:
        if self.lengths is not None and rows != self.methods.numel():
            return segments_of(self._spread(rows).to(device), rows, ranks)
        self.check(rows)
        return segments_of(self.methods.to(device), rows, ranks)

    def _spread(self, rows: int) -> Tensor:
        if self.lengths is not None and rows == int(self.lengths.sum()):
            return self.methods.repeat_interleave(self.lengths.to(self.methods.device))
        self.check(rows)
        return self.methods.repeat_interleave(rows // max(self.methods.numel(), 1))

    def check(self, rows: int) -> None:
        """ValueError unless a batch of ``rows`` rows has equally many for each route."""
        count = self.methods.numel()
        if count and rows % count == 0:
            return
        tokens = "" if self.lengths is None else f" of {int(self.lengths.sum())} tokens"
        raise ValueError(
            f"routes name the methods of {count} rows{tokens}, and this forward has {rows}: give"
            " one name for each row of the batch"
        )


def _single(methods: Tensor) -> int | None:
    """The method of all rows, if there is one and the host knows it."""
    if methods.device.type != "cpu" or not methods.numel():
        return None
    first = int(methods[0])
    return first if bool((methods == first).all()) else None


def capturing() -> bool:
    """Whether the kernels that are launched now become part of a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def needs_every_gradient() -> bool:
    """Whether a method without rows has gradients of zero here, and not none."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and torch.is_grad_enabled()


def _draw(generator: torch.Generator, count: int) -> Tensor:
    """Seeds (count, 2) from a generator. A checkpoint around this call draws them again."""
    if in_checkpoint():
        run_again_in(generator, partial(_from_state, generator, generator.get_state()))
    return torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, generator=generator)


@contextlib.contextmanager
def _from_state(generator: torch.Generator, state: Tensor) -> Iterator[None]:
    """In this block a generator goes on from an earlier state."""
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


class Routing:
    """The routes of one model. Its sites read them in each forward.

    ``default`` holds where no block of routes is open: all rows under one method.
    """

    def __init__(self):
        self.ids: dict[str, int] = {}
        self.generators: dict[int, torch.Generator] = {}  # of methods with seeds of their own
        self.default = Routes(torch.tensor([NONE]))
        self.gate = Gate()
        self._now, self._eagerly = PerThread(), PerThread()

    def id_of(self, name: str) -> int:
        """The id of a method; a new name gets the smallest free one."""
        if name not in self.ids:
            self.ids[name] = next(i for i in range(self.count + 1) if i not in self.ids.values())
        return self.ids[name]

    @property
    def count(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=NONE) + 1

    def draw_seeds(
        self, probabilities: Sequence[float], device: torch.device, draws: int
    ) -> Tensor:
        """A seed for each method (G, 2) int64. A method with a generator of its own draws from it,
        where it drops something, ``draws`` seeds as it does alone."""
        seeds = draw_seed(device, len(probabilities))
        for method, generator in self.generators.items():
            if method < len(probabilities) and drops(probabilities[method]):
                seeds[method] = _draw(generator, draws).to(device)[0]
        return seeds

    def seeds_of(self, method: int, draws: int = 1) -> AbstractContextManager:
        """In this block, where the site of one method runs by itself, the seeds are drawn from the
        method's own generator, if it has one; at least ``draws`` at a time."""
        generator = self.generators.get(method)
        if generator is None:
            return contextlib.nullcontext()
        return seeds_from(lambda count: _draw(generator, max(count, draws))[:count])

    def now(self) -> Routes:
        """The routes in force in this thread. A checkpoint around this call runs again in backward
        under the same ones."""
        if torch.compiler.is_exporting() and self._now.local.value is not None:
            raise RuntimeError("torch.export under routes: route(model, None) first")
        routes = self._now.get()
        if routes is None:
            return self.default
        run_again_in(self, lambda: self.using(routes))
        return routes

    @staticmethod
    def may_act(method: int, routes: Routes) -> bool:
        """Whether a method has to be computed: it may have rows, or DDP waits for it."""
        present = routes.present
        return present is None or method in present or needs_every_gradient()

    @contextlib.contextmanager
    def using(self, routes: Routes | None) -> Iterator[None]:
        """In this block the forwards of this thread run under ``routes``."""
        before = self._now.get()
        self.put(routes)
        try:
            yield
        finally:
            self.put(before)

    def put(self, routes: Routes | None) -> None:
        """Run this thread's forwards under ``routes`` from now on; None: the default. A graph that
        was compiled before has the default's method in it, so that none runs under routes."""
        eagerly = self._eagerly.get()
        if routes is not None and eagerly is None:
            self._eagerly.put(RunsEagerly())
        self._now.put(routes)
        if routes is None and eagerly is not None:
            self._eagerly.put(None)
            eagerly.end()

    def get(self) -> Routes | None:
        """What this thread put last."""
        return self._now.get()

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook (with keywords) of the model: the first tensor has the batch's rows."""
        if torch.compiler.is_compiling():
            return  # all rows are under the default's method
        self.gate.enter()
        given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1)
        first, routes = next(given, None), self.now()
        routes.begin(None if first is None else first.shape[0])

    def end(self, *_) -> None:
        """Forward hook of the model, which runs after an error too."""
        if not torch.compiler.is_compiling():
            self.gate.leave()


class MethodSwitch:
    """Whether one of several methods is off in this thread: the switch of all is off, or all rows
    are under another method."""

    any_block = True  # a site asks :meth:`is_off` in each forward

    def __init__(self, switch, routing: Routing, method: int):
        self.switch, self.routing, self.method = switch, routing, method

    def is_off(self) -> bool:
        """Whether the method acts on no row of this forward, as far as the host knows."""
        if self.switch.any_block and self.switch.is_off():
            return True
        routes = self.routing.now()
        if routes.alone is not None:
            return routes.alone != self.method
        return not self.routing.may_act(self.method, routes)
