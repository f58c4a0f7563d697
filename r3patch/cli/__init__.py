"""The command line: doctor, inspect, report, demo. The only part of the package that prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from r3patch._errors import R3PatchError

#: A command is the module of its name, with ``add_arguments(parser)`` and ``run(args) -> int``.
COMMANDS = {
    "doctor": "is replay on, and what would keep it off",
    "inspect": "look into a file of routes, or compare two",
    "report": "one page from the traces of a run",
    "demo": "train a tiny MoE model with MTP on this CPU, with and without replay",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is its own, 2 for wrong use, 1 for an error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="r3patch", description="Rollout routing replay.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if argv[:1] == [name]:  # the others are not even imported
            module = import_module(f"r3patch.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (R3PatchError, OSError) as error:
        print(f"r3patch {args.command}: {error}", file=sys.stderr)
        return 1
