"""The ``pelt-fast`` command: one file a subcommand."""

import argparse
import sys

from . import bench, check, explain, info, methods, study, train

COMMANDS = {
    "info": info, "check": check, "explain": explain, "methods": methods, "train": train,
    "study": study,
    "bench": bench,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 a check missed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="pelt-fast", description="Fast parameter-efficient fine-tuning."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.__doc__.splitlines()[0]
        command.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"pelt-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pelt-fast {options.command}: stopped", file=sys.stderr)
        return 130
