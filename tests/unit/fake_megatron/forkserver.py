"""Runs snippets of Python, each in a fork of an interpreter that has imported torch and no more.

As fresh as a new interpreter for r3patch, wrapt and megatron, without a second of torch each time.
Reads jobs and writes results as lines of JSON.
"""

import json
import os
import sys
import traceback
from typing import Any

import torch.nn  # noqa: F401


def run(job: dict[str, Any], output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job["env"])
    sys.path[:0] = job["path"]
    status = 0
    try:
        exec(compile(job["code"], "<snippet>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        run(json.loads(line), write_end)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, text]), flush=True)
