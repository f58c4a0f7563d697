"""``r3patch run COMMAND...``: a command whose Python processes import r3patch with Megatron.

A folder with a ``sitecustomize`` goes first on PYTHONPATH, so it reaches what the command starts,
too: torchrun's ranks, what a shell script calls, spawned processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from r3patch import _startup

FOLDER = str(Path(_startup.__file__).parent)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="COMMAND...",
        help="such as: torchrun --nproc-per-node 8 train.py",
    )
    parser.epilog = (
        "Processes that replace PYTHONPATH, or ignore it (python -I, -E, -S), are not reached: "
        "`r3patch auto on` reaches all but -S. The exit status is the command's own; 127: it was "
        "not found, 126: it could not be started."
    )


def run(args: argparse.Namespace) -> int:
    """Become the command, so that signals and the exit status are its own."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        print("r3patch run: no command, expected: r3patch run COMMAND...", file=sys.stderr)
        return 2
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, environment(os.environ))  # noqa: S606  # no shell between
    except FileNotFoundError:
        status, text = 127, "not found: there is no such command on PATH, or no interpreter for it"
    except OSError as error:
        status, text = 126, f"cannot be started: {error.strerror}"
    print(f"r3patch run: {command[0]}: {text}", file=sys.stderr)
    return status


def environment(environ: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """The environment of the command: that of this process, and the start-up folder.

    An empty entry of PYTHONPATH would mean the working directory, so none is added.
    """
    before = environ.get("PYTHONPATH", "").split(os.pathsep) if environ.get("PYTHONPATH") else []
    path = [FOLDER, *(entry for entry in before if entry != FOLDER)]
    return {**environ, "PYTHONPATH": os.pathsep.join(path)}
