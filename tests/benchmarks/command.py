"""pelt-fast bench in this process, where a test can replace what it reads."""

from benchmarks import bench


def main(arguments: list[str]) -> int:
    """The exit status of ``pelt-fast`` with these arguments."""
    command, *rest = arguments
    assert command == "bench"
    return bench.main(rest)
