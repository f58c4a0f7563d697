#!/usr/bin/env bash
# venv.sh NAME PYTHON EXTRAS [GROUP...]: .venv/NAME with the wheel of this tree, its extras and
# dependency groups. What it depends on is installed once, and again whenever that changes; the
# wheel each time.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 python=$2 extras=$3
shift 3
venv=.venv/$name

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$python is $("$python" --version 2>&1), expected Python 3.10 or newer: make ... PYTHON=python3.12" >&2
    exit 1
}
# The newest Megatron that installs: 0.17 and newer need Python 3.12.
minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
if [ "$minor" -ge 12 ]; then megatron=0.19.2; else megatron=0.16.1; fi

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} "$@" \
        2> >(grep -v 'is ignored' >&2)
}
stamp=$(cat pyproject.toml constraints.txt tools/venv.sh | cksum; echo "$minor $extras $*")
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "making $venv: Python 3.$minor, megatron-core $megatron (the first time takes minutes)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    install -c constraints.txt pip hatchling # a pip that knows --group
    install -c constraints.txt torch numpy
    install -c constraints.txt "megatron-core==$megatron" ".[$extras]" ${@/#/--group=}
    echo "$stamp" >"$venv/stamp"
fi
install --no-deps --no-build-isolation --force-reinstall .
