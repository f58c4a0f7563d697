#!/usr/bin/env bash
# hook.sh TOOL ARGUMENTS...: a tool of the environment that `make lint` or `make test` has made.
set -euo pipefail
cd "$(dirname "$0")/.."
for venv in .venv/dev-*; do
    [ ! -x "$venv/bin/$1" ] || exec "$venv/bin/$1" "${@:2}"
done
echo "no .venv/dev-* has $1: run \`make lint\` once" >&2
exit 1
