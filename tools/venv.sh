#!/usr/bin/env bash
# venv.sh demo|dev PYTHON: prints the environment, made once and again whenever what it depends on
# changes. The wheel of this tree is built and installed in it each time.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1 python=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$python is $("$python" --version 2>&1), expected Python 3.10 or newer: make ... PYTHON=python3.12" >&2
    exit 1
}
minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
case $kind in
    demo) wanted=(".[demo]") ;;
    dev) wanted=(".[rollout,cli,report]" --group=dev) ;;
esac
# The newest Megatron that installs: 0.17 and newer need Python 3.12.
if [ "$minor" -ge 12 ]; then megatron=0.19.2; else megatron=0.16.1; fi
wanted+=("megatron-core==$megatron")
venv=.venv/$kind-3.$minor

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} "$@" \
        2> >(grep -v 'is ignored' >&2)
}
stamp=$({
    sed -n '/^dependencies = /p; /^\[project.optional-dep/,/^\[project.scripts/p' pyproject.toml
    cat constraints.txt tools/venv.sh
} | cksum)
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "making $venv: Python 3.$minor, megatron-core $megatron (the first time takes minutes)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    install -c constraints.txt pip hatchling # a pip that knows --group
    install -c constraints.txt torch numpy
    install -c constraints.txt "${wanted[@]}"
    echo "$stamp" >"$venv/stamp"
fi
install --no-deps --no-build-isolation --force-reinstall .
echo "$venv"
