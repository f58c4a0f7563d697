#!/usr/bin/env bash
# Every check of this repository, with every suitable Python of this machine: one before 3.12 with
# megatron-core 0.16.1, one from 3.12 on with 0.19.2, side by side. REQUIRE_PYTHONS=2 insists on
# both. CONTRIBUTING.md has a sentence on each check.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

old=$(tools/pythons.sh 10 11) new=$(tools/pythons.sh 12 13)
pythons=(${old:+"$old"} ${new:+"$new"})
if [ "${#pythons[@]}" -lt "${REQUIRE_PYTHONS:-1}" ]; then
    echo "found ${#pythons[@]} suitable Pythons (3.10-3.11: '${old:-none}', 3.12-3.13:" \
        "'${new:-none}'), expected ${REQUIRE_PYTHONS:-1}" >&2
    exit 1
fi

venvs=()
for python in "${pythons[@]}"; do venvs+=("$(tools/venv.sh dev "$python")"); done
tools/lint.sh "${venvs[0]}"

export COVERAGE_FILE=$PWD/.venv/coverage/data
rm -rf .venv/coverage && mkdir -p .venv/coverage
tests() { # Not `python -m pytest`, which would find the source tree before the installed package.
    "$1/bin/coverage" run "$1/bin/pytest" -q -p no:cacheprovider --durations=10 2>&1 |
        sed -u "s/^/${1#.venv/dev-}  /"
}
ran=()
for venv in "${venvs[@]}"; do tests "$venv" & ran+=($!); done
status=0 # a failure with the one Python does not hide the other's
for job in "${ran[@]}"; do wait "$job" || status=1; done

coverage=${venvs[0]}/bin/coverage
"$coverage" combine --quiet
# Some lines are one Megatron's: the bar is for both together.
if [ "${#venvs[@]}" = 2 ]; then "$coverage" report; else "$coverage" report --fail-under=0; fi || status=1
exit $status
