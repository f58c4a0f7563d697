#!/usr/bin/env bash
# engine.sh PYTHON [--write]: a real vLLM on this CPU generates, offline and over HTTP, and stock
# Megatron replays what it sent: 0.16.1, and 0.19.2 where there is a Python for it. PYTHON is 3.11,
# or one on this machine is taken. --write: what it sent becomes the tests' data, the table the page's.
set -euo pipefail
cd "$(dirname "$0")/.."
write=${2:-}
python=$1
if [ "$("$python" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" != "3 11" ]; then
    python=$(tools/pythons.sh 11)
fi
if [ -z "$python" ]; then
    echo "$1 is $("$1" --version 2>&1), expected Python 3.11, which vLLM's CPU build is for:" \
        "make engine PYTHON=python3.11" >&2
    exit 1
fi

engine=.venv/engine
stamp=$(cksum <tools/engine.txt)
if [ "$(cat $engine/stamp 2>/dev/null)" != "$stamp" ]; then
    echo "making $engine: vLLM's CPU build" >&2
    rm -rf $engine
    "$python" -m venv $engine
    # Compiled when it is imported: most of it never is.
    $engine/bin/python -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} \
        --no-compile --no-deps -r tools/engine.txt 2> >(grep -v 'is ignored' >&2)
    echo "$stamp" >$engine/stamp
fi
venvs=("$(tools/venv.sh dev "$python")")
newer=$(tools/pythons.sh 12 13)
if [ -n "$newer" ]; then venvs+=("$(tools/venv.sh dev "$newer")"); fi

run=.venv/engine-run
rm -rf $run && mkdir $run
export TORCHDYNAMO_DISABLE=1 PYTHONDONTWRITEBYTECODE=
asking=()
for asked in rollout serve; do # each with checkpoints of its own, which the other does not write
    $engine/bin/python tools/engine/$asked.py $run/$asked $run/payloads >$run/$asked.log 2>&1 &
    asking+=($!)
done
for job in "${asking[@]}"; do wait "$job" || { tail -n 40 $run/*.log >&2 && exit 1; }; done
mv $run/rollout $run/checkpoints
if [ "$write" = --write ]; then
    cp $run/payloads/*.json tests/data/engine/
    $engine/bin/python tools/engine/expected.py tests/data/hf/expected.json >$run/expected.log 2>&1
fi
$engine/bin/python tools/engine/table.py $run ${write:+"$write"} "${venvs[@]}"
