"""The share of the suite that ``make test`` runs: ``pytest --quick``. ``make test-all`` runs all of it.

A test of three parameters or more runs with a few of their combinations, chosen so that any two
values which meet in some combination still meet in one: nearly every fault depends on one value or
on two. ``@pytest.mark.quick(every=5)`` takes every fifth combination of an expensive test instead.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence

MARK = "quick(every): pytest --quick runs one of so many combinations of the test's parameters"


def covering(rows: Sequence[dict]) -> list[int]:
    """The indices of a few rows in which every pair of values of ``rows`` occurs."""
    pairs = [set(itertools.combinations(sorted(row.items()), 2)) for row in rows]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def chosen(items: Sequence) -> list:
    """Those of one test's combinations that run."""
    mark = items[0].get_closest_marker("quick")
    if mark is not None:
        return list(items[:: mark.kwargs["every"]])
    rows = [
        {name: id(value) for name, value in item.callspec.params.items()}
        for item in items if hasattr(item, "callspec")
    ]  # fmt: skip
    if len(rows) < len(items) or len(rows[0]) < 3 or len({tuple(row) for row in rows}) > 1:
        return list(items)
    return [items[i] for i in covering(rows)]


def select(config, items: list) -> None:
    """Leave the quick share in ``items``."""
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    kept = {item for each in tests.values() for item in chosen(each)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
