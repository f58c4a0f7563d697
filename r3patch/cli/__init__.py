"""The command line, a module for each command. The only part of the package that prints."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from r3patch._errors import R3PatchError
from r3patch._version import version

#: A command is the module of its name, with ``add_arguments(parser)`` and ``run(args) -> int``.
COMMANDS = {
    "doctor": "is replay on, and what would keep it off",
    "auto": "switch r3patch on for every process of this environment that imports Megatron",
    "run": "run a command whose processes import r3patch with Megatron",
    "inspect": "look into a file of routes, or compare two",
    "report": "is a run good: a verdict and one page from its traces",
    "demo": "train a small MoE model with MTP on this CPU, in four ways, and see what is served",
}
#: Which extra brings a package that commands import.
EXTRAS = {
    "rich": "cli",
    "matplotlib": "report",
    "numpy": "rollout",
    "pybase64": "rollout",
    "safetensors": "rollout",
    "torch": "megatron",
    "megatron": "megatron",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is its own, 2 for wrong use, 1 for an error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="r3patch", description="Rollout routing replay.")
    parser.add_argument("--version", action="version", version=f"r3patch {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a terminal that lacks our bars and marks shows a "?"
                stream.reconfigure(errors="replace")
    try:
        for name, text in COMMANDS.items():
            command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
            if argv[:1] == [name]:  # the others are not even imported
                module = import_module(f"r3patch.cli.{name}")
                module.add_arguments(command)
                command.set_defaults(run=module.run)
        args = parser.parse_args(argv)
        return int(args.run(args) or 0)
    except ImportError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"r3patch {argv[0]}: this needs {(error.name or '').partition('.')[0]} ({error}). "
            f"Install it from a checkout of r3patch: pip install '.[{extra}]'",
            file=sys.stderr,
        )
    except (R3PatchError, OSError) as error:
        print(f"r3patch {argv[0]}: {error}", file=sys.stderr)
    return 1
