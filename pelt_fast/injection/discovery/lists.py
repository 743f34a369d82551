"""The lists of layers of a model, and which attentions each layer has."""

from collections.abc import Iterator

from torch import nn

from pelt_fast.layouts.lookup import find

from .attentions import Found
from .trace import Trace


class Lists:
    """The lists of layers that the attentions are in."""

    def __init__(self, base: nn.Module, ran: Trace, found: list[Found]):
        self._base, self._calls = base, ran.by_path
        self._own: dict[str, dict[int, list[Found]]] = {}
        for each in found:
            path, index = _list_of(each, found)
            if path is not None:
                self._own.setdefault(path, {}).setdefault(index, []).append(each)

    @property
    def paths(self) -> list[str]:
        """Their paths, in the order in which they run."""
        return list(self._own)

    def layers(self, path: str) -> Iterator[tuple[int, list[Found]]]:
        """Every layer's index and attentions, those of self-attention first."""
        for index in range(len(find(self._base, path))):
            own = self._own[path].get(index, [])
            yield index, sorted(own, key=lambda found: (found.is_cross, found.attended.at))

    def owner(self, path: str) -> str:
        """The nearest module around a list that is called once in a forward."""
        while path:
            path = path.rpartition(".")[0]
            if len(self._calls.get(path, [])) == 1:
                return path
        return ""


def _list_of(each: Found, found: list[Found]) -> tuple[str | None, int]:
    """The outermost list in whose layers there is one self-attention at most, and one cross; the
    innermost where a layer itself has several (TimeSformer's, in time and in space)."""
    steps, innermost = each.path.split("."), (None, 0)
    for at, step in enumerate(steps):
        if step.isdigit():
            innermost = ".".join(steps[:at]), int(step)
            layer = ".".join(steps[: at + 1])
            inside = [other for other in found if f"{other.path}.".startswith(f"{layer}.")]
            crosses = [other.is_cross for other in inside]
            if crosses.count(True) <= 1 and crosses.count(False) <= 1:
                return innermost
    return innermost
