"""The share of the suite that ``make test`` runs: ``pytest --quick``. ``make test-all`` runs all of it.

A test of three parameters or more runs with a few of their combinations, chosen so that any two
values which meet in some combination still meet in one: nearly every fault depends on one value or
on two. Where two parameters have many combinations, every value occurs twice. ``@pytest.mark.quick``
says otherwise for an expensive test: ``every=5`` takes every fifth combination, ``every=0`` none.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

MARK = "quick(every): pytest --quick runs one of so many combinations of the test's parameters"
MANY, TWICE = 24, 2  # combinations of two parameters; how often each value occurs


def covering(rows: Sequence[dict]) -> list[int]:
    """The indices of a few rows in which every pair of values of ``rows`` occurs; of rows of two
    values every value twice."""
    if len(rows[0]) > 2:
        parts = [set(itertools.combinations(sorted(row.items()), 2)) for row in rows]
        times = 1
    else:
        parts, times = [set(row.items()) for row in rows], TWICE
    missing = {part: min(n, times) for part, n in Counter(itertools.chain(*parts)).items()}
    chosen, left = [], list(range(len(rows)))
    while any(missing.values()):
        best = max(left, key=lambda i: sum(missing[part] > 0 for part in parts[i]))
        chosen.append(best)
        left.remove(best)
        for part in parts[best]:
            missing[part] -= missing[part] > 0
    return sorted(chosen)


def chosen(items: Sequence) -> list:
    """Those of one test's combinations that run."""
    mark = items[0].get_closest_marker("quick")
    if mark is not None:
        return list(items[:: mark.kwargs["every"]]) if mark.kwargs["every"] else []
    rows = [
        {name: id(value) for name, value in item.callspec.params.items()}
        for item in items if hasattr(item, "callspec")
    ]  # fmt: skip
    same = len(rows) == len(items) and len({tuple(row) for row in rows}) == 1
    if not same or len(rows[0]) < 2 or (len(rows[0]) == 2 and len(rows) <= MANY):
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
