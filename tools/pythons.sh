#!/usr/bin/env bash
# pythons.sh MINOR...: prints the first Python 3 of this machine with one of these minor versions;
# nothing if there is none.
set -euo pipefail
candidates=(python3 python3.11 python3.12 python3.13 python3.10)
for root in "${PYENV_ROOT:-$HOME/.pyenv}"; do
    for python in "$root"/versions/*/bin/python; do candidates+=("$python"); done
done
for python in "${candidates[@]}"; do
    # A shim of pyenv can be on the path and fail: only what runs counts.
    minor=$("$python" -c 'import sys, venv, ensurepip; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)' 2>/dev/null) || continue
    case " $* " in *" $minor "*) echo "$python" && exit ;; esac
done
