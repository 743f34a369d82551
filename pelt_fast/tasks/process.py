"""What a run takes of the machine: a process of its own, and memory that it keeps."""

import ctypes
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

LOADED = ["torch", "transformers", "datasets", "pelt_fast.tasks.study"]  # once, for every process
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # mallopt's names of them
MOST = 2**31 - 1


def alone(function: Callable, *arguments):
    """``function(*arguments)`` in a process of its own, so that its peak of memory is nobody
    else's; function, arguments and result are pickled. Raises what it raises, BrokenProcessPool
    where the process dies."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(LOADED)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(function, *arguments).result()


def _end_with_parent() -> None:
    """A study that is killed leaves no run behind."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step; whether it was told to. It hands large blocks
    back at once otherwise and gets them again page by page: a third of a small model's step on a
    CPU (docs/facts.md)."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, MOST))
