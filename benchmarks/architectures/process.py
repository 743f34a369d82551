"""One family in a process of its own, so that one that hangs or dies does not stop the others."""

import json
import os
import signal

from .cells import Family, TooSmall, Wrong, cell


def family(kind: str, class_name: str, methods: list[str], seconds: float) -> dict:
    """The entry of a family: {"cells": {method: cell}}, with "not_built" where there is no model.
    The child is a fork, so that nothing is imported again."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # kills it
        with os.fdopen(write, "w") as out:
            for found in _cells(kind, class_name, methods):
                out.write(json.dumps(found) + "\n")
                out.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        found = [json.loads(line) for line in lines]
    _, status = os.waitpid(child, 0)
    entry: dict = {"cells": {}}
    for line in found:
        if "not_built" in line:
            entry["not_built"] = line["not_built"]
        else:
            entry["cells"][line.pop("method")] = line
    if status:
        why = "it took too long" if os.WIFSIGNALED(status) else f"its process ended with {status}"
        if not found:
            entry["not_built"] = why
        else:
            entry["cells"] |= {m: {"unfinished": why} for m in methods if m not in entry["cells"]}
    return entry


def _cells(kind: str, class_name: str, methods: list[str]):
    try:
        made = Family(kind, class_name)
    except Exception as error:
        yield {"not_built": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        return
    yield from (_told(made, method) for method in methods)


def _told(made: Family, method: str) -> dict:
    try:
        return {"method": method, **cell(made, method)}
    except TooSmall as error:
        return {"method": method, "unfinished": str(error)}
    except Wrong as error:
        return {"method": method, "wrong": str(error)[:300]}
    except Exception as error:
        return {"method": method, "wrong": f"{type(error).__name__}: {str(error)[:300]}"}
