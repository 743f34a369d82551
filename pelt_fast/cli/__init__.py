"""The ``pelt-fast`` command: one file for each subcommand. Only the requested one is imported."""

import argparse
import importlib
import sys

COMMANDS = ("info", "check", "explain", "methods", "init", "train", "generate", "merge", "export",
            "study", "bench")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command line.

    Args:
        arguments: the arguments after ``pelt-fast``; None reads ``sys.argv``.

    Returns:
        The exit status: 0 done, 1 a check failed, 2 bad input, 130 stopped by the user.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="pelt-fast", description="Fast parameter-efficient fine-tuning."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = [name for name in arguments[:1] if name in COMMANDS] or COMMANDS
    commands = {name: importlib.import_module(f"{__name__}.{name}") for name in asked}
    for name, command in commands.items():
        summary = (command.__doc__ or "").splitlines()[0]
        command.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    try:
        return commands[options.command].run(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"pelt-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pelt-fast {options.command}: stopped", file=sys.stderr)
        return 130
