"""Work done by other threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads divide torch's work among as many as the caller's does: that number
    belongs to each thread, and a sum may depend on it."""
    return ThreadPoolExecutor(threads, "", torch.set_num_threads, (torch.get_num_threads(),))


def in_a_thread(function: Callable):
    """What ``function`` returns when another thread calls it."""
    with _pool(1) as pool:
        return pool.submit(function).result()


def together(functions: list[Callable]) -> list:
    """What each returns, a thread each, all begun at once."""
    start = threading.Barrier(len(functions))

    def one(function):
        start.wait()
        return function()

    with _pool(len(functions)) as pool:
        return list(pool.map(one, functions))
