#!/usr/bin/env bash
# Every check of this repository, with every suitable Python of this machine: one before 3.12 with
# megatron-core 0.16.1, one from 3.12 on with 0.19.2. REQUIRE_PYTHONS=2 insists on both.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

candidates=(python3 python3.11 python3.12 python3.13 python3.10)
for root in "${PYENV_ROOT:-$HOME/.pyenv}"; do
    for python in "$root"/versions/*/bin/python; do candidates+=("$python"); done
done
old="" new=""
for python in "${candidates[@]}"; do
    # A shim of pyenv can be on the path and fail: only what runs counts.
    minor=$("$python" -c 'import sys, venv, ensurepip; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)' 2>/dev/null) || continue
    case "$minor" in
        10 | 11) old=${old:-$python} ;;
        12 | 13) new=${new:-$python} ;;
    esac
done
found=$(((${#old} > 0) + (${#new} > 0)))
if [ "$found" -lt "${REQUIRE_PYTHONS:-1}" ]; then
    echo "found $found suitable Pythons (3.10-3.11: '${old:-none}', 3.12-3.13: '${new:-none}')," \
        "expected ${REQUIRE_PYTHONS:-1}" >&2
    exit 1
fi

[ -z "$old" ] || tools/venv.sh "test-old" "$old" "test,lint"
[ -z "$new" ] || tools/venv.sh "test-new" "$new" "test,lint"
if [ -n "$old" ]; then lint=.venv/test-old/bin; else lint=.venv/test-new/bin; fi

"$lint/ruff" check .
"$lint/ruff" format --check .
"$lint/mypy"
"$lint/python" tools/check_links.py

status=0 # a failure with the one Python does not hide the other's
[ -z "$old" ] || .venv/test-old/bin/python -m pytest -q || status=1
[ -z "$new" ] || .venv/test-new/bin/python -m pytest -q || status=1
exit $status
