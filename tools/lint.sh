#!/usr/bin/env bash
# lint.sh VENV: the checks that run nothing: ruff, mypy, pyright, the links of the pages.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/pyright" --pythonpath "$bin/python"
"$bin/python" tools/check_links.py
