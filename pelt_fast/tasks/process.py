"""A separate process for a run, and memory that a run keeps for its next step."""

import ctypes
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

# imported once, for all processes
LOADED = ["torch", "transformers", "datasets", "pelt_fast.tasks.study"]
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt
MOST = 2**31 - 1


def alone(function: Callable, *arguments):
    """Run ``function(*arguments)`` in a new process, so that its peak of memory is measured alone.

    Function, arguments and result are pickled. Raises what the function raises, and
    BrokenProcessPool when the process dies.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(LOADED)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(function, *arguments).result()


def _end_with_parent() -> None:
    """End this process when the study's process ends."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step; returns whether it will. By default it gives
    large blocks back to the system and gets them again page by page, which takes a third of a small
    model's step on a CPU (docs/facts.md)."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, MOST))
