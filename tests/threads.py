"""Work done by other threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def in_a_thread(function: Callable):
    """What ``function`` returns when another thread calls it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def together(functions: list[Callable]) -> list:
    """What each returns, a thread each, all begun at once."""
    start = threading.Barrier(len(functions))

    def one(function):
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(one, functions))
