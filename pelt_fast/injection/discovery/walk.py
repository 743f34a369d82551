"""The walk of the autograd graph back from a node."""

from collections.abc import Container, Iterator


def back(start, stations: Container) -> Iterator:
    """The nodes that can be reached from ``start``; a station is the end of its way."""
    seen, waiting = set(), [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stations:
            waiting += [before for before, _ in node.next_functions]
