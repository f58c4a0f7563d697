#!/usr/bin/env bash
# gpu.sh [tests|bench|all]: what needs a GPU, with the Python of PYTHON, which has torch for CUDA,
# megatron-core 0.19.2 and pytest. Every file of tests/gpu has a process of its own, all side by
# side: what breaks a CUDA context breaks one of them. Ends in 8 minutes or less, whatever happens.
# DEVICE=cpu rehearses the tests; OUT is the folder of the logs and of the benchmark's figures.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} what=${1:-all} out=${OUT:-build/gpu} device=${DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
mkdir -p "$out"

"$python" - <<'END' || exit 1
import sys, torch
from importlib import metadata
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {gpu}, "
      f"megatron-core {metadata.version('megatron-core')}", flush=True)
END

status=0
if [ "$what" != bench ]; then
    ran=() files=(tests/gpu/test_*.py)
    for file in "${files[@]}"; do
        log=$out/$(basename "$file" .py).log
        timeout -k 5 "${LIMIT:-240}" "$python" -m pytest -q -p no:cacheprovider --tb=short \
            --durations=5 --device "$device" ${SELECT:+-k "$SELECT"} "$file" >"$log" 2>&1 &
        ran+=($!)
    done
    for index in "${!ran[@]}"; do
        name=$(basename "${files[$index]}" .py)
        wait "${ran[$index]}" && continue
        code=$? status=1
        [ $code = 124 ] && echo "$name: ran out of time"
        grep -hE '^(E  |FAILED|ERROR)' "$out/$name.log" | cut -c1-300 | awk '!seen[$0]++' | head -25
    done
    for file in "${files[@]}"; do
        name=$(basename "$file" .py)
        printf '%-16s %s\n' "${name#test_}" "$(tail -n 1 "$out/$name.log" | cut -c1-200)"
    done
fi
if [ "$what" != tests ]; then
    timeout -k 5 "${BENCH_LIMIT:-240}" "$python" -W ignore benchmarks ${BENCH:-} --device "$device" \
        --seconds "${SECONDS_OF_BENCH:-120}" --json "$out/bench.json" 2>"$out/bench.err" |
        tee "$out/bench.log" || { status=1 && tail -n 20 "$out/bench.err"; }
fi
exit $status
