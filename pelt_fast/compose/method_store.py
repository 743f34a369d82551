"""Many saved methods served by one model: those in use are in it, the others on disk."""

import contextlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from pelt_fast.injection.handles import refuse_second
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import unwrapped

from .route import route
from .together import add_method, drop_method, put_together


class MethodStore:
    """Serves saved methods with one resident base. Safe to use from many threads.

    A method is read from its folder when a batch first names it. If more than ``most`` methods are
    in the model, the one that was named longest ago and that no batch is running under is dropped.

    Args:
        model: a model without a method.
        folders: for each name the folder that :func:`pelt_fast.save` wrote.
        most: how many methods stay in the model. More stay while the batches that run need them.
        layout: as for :func:`pelt_fast.inject`.

    Raises:
        TypeError: ``folders`` maps no names to folders.
        ValueError: ``most`` is below 1, a name has a dot, or the model carries a method.

    Example:
        store = pelt_fast.MethodStore(model, {"news": "runs/news", "mail": "runs/mail"}, most=8)
        with store.route(["news", "mail", None]):
            model.generate(**batch)
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Mapping[str, str | os.PathLike],
        *,
        most: int = 16,
        layout: Layout | None = None,
    ):
        if not isinstance(folders, Mapping):
            raise TypeError(f"folders must map names to folders, got {type(folders).__name__}")
        if not isinstance(most, int) or most < 1:
            raise ValueError(f"most must be a whole number of 1 or more, got {most!r}")
        self.model, self.most = model, most
        self.folders = {name: Path(folder) for name, folder in folders.items()}
        self._lock = threading.RLock()
        self._resident: OrderedDict[str, None] = OrderedDict()  # the latest last
        self._running: Counter[str] = Counter()
        refuse_second(unwrapped(model))
        put_together(unwrapped(model), {}, layout)

    @property
    def resident(self) -> list[str]:
        """The methods in the model, the one that was named longest ago first."""
        return list(self._resident)

    @contextlib.contextmanager
    def route(self, methods: str | Sequence[str | None]) -> Iterator[nn.Module]:
        """A block in which each row of a batch runs under a method (:func:`pelt_fast.route`).

        Args:
            methods: a name for each row, None for the base alone; or one name for all rows.

        Returns:
            A context manager that gives the model.

        Raises:
            ValueError: an unknown name, or a method of another base.
            FileNotFoundError: a folder holds no saved method.
        """
        names = [methods] if isinstance(methods, str) else list(methods)
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        self._bring(wanted)
        try:
            with route(self.model, methods):
                yield self.model
        finally:
            with self._lock:
                self._running.subtract(wanted)
                self._shrink()

    def _bring(self, wanted: list[str]) -> None:
        """Read the methods that are not in the model."""
        with self._lock:
            for name in wanted:
                if name not in self.folders:
                    known = ", ".join(self.folders) or "none"
                    raise ValueError(f"no method is named {name!r}; there are {known}")
            for name in wanted:
                if name not in self._resident:
                    add_method(self.model, name, self.folders[name])
                self._resident[name] = None
                self._resident.move_to_end(name)
            self._running.update(wanted)
            self._shrink()

    def _shrink(self) -> None:
        """Drop methods beyond ``most`` that no batch runs under."""
        for name in list(self._resident):
            if len(self._resident) <= self.most:
                return
            if not self._running[name]:
                drop_method(self.model, name)
                del self._resident[name]
