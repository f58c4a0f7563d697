"""What the start-up file of ``r3patch auto on`` costs a Python that never imports Megatron.

``python benchmarks/startup.py [rounds]``: interpreters that do nothing, with the file and without,
in turns, and one that imports r3patch at once. Milliseconds of the processor, not of the clock:
best and median of each; the ratio is of medians.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from r3patch.cli import auto

EAGER = "import sys; sys.path += {path!r}; import r3patch"


def measure(rounds: int) -> dict[str, list[float]]:
    """User and system time of a process, in milliseconds, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        plain, armed = Path(folder, "plain"), Path(folder, "armed")
        for environment in (plain, armed):
            venv.create(environment, symlinks=True)
        (site,) = armed.glob("lib/python*/site-packages")
        auto._write(site)
        commands: dict[str, list[str | Path]] = {
            "without": [plain / "bin" / "python", "-c", "pass"],
            "with the file": [armed / "bin" / "python", "-c", "pass"],
            "import r3patch": [plain / "bin" / "python", "-c", EAGER.format(path=sys.path)],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                start = spent()
                subprocess.run(command, check=True)
                if number:  # the first of each compiles and fills caches
                    times[name].append(1e3 * (spent() - start))
    return times


def spent() -> float:
    """Processor seconds of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    times = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    base = statistics.median(times["without"])
    print("| a Python that does nothing | best ms | median ms | of without |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {min(values):.1f} | {median:.1f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
