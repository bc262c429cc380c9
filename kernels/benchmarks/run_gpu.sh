#!/usr/bin/env bash
# Everything worth knowing about the kernels on one GPU, in at most 8 minutes, into one folder:
#
#     bash kernels/benchmarks/run_gpu.sh [results folder]
#
# Tests on the GPU first: a benchmark of a wrong kernel is worth nothing. Each step has a time limit
# and the next one runs whatever became of it; the exit status is 1 when one failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' /' '--')
out=${1:-kernels/benchmarks/results/$name}
python=${PYTHON:-python}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
failed=0

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    { echo "$ $*"; timeout "$limit" "$@"; } > "$out/$name.txt" 2>&1
    local status=$?
    tail -4 "$out/$name.txt"
    if [ "$status" -ne 0 ]; then
        echo "$name: status $status"
        failed=1
    fi
}

nvidia-smi > "$out/nvidia-smi.txt"
"$python" -m torch.utils.collect_env > "$out/environment.txt" 2>&1
attention=kernels/benchmarks/attention.py

step tests-attention 180 "$python" -m pytest -q -m gpu tests/test_shared_kv_attention_triton.py
step tests-loss 30 "$python" -m pytest -q -m gpu tests/test_distill_loss_triton.py
step attention 130 "$python" $attention --seconds 100 \
    --csv "$out/attention.csv" --plot "$out/attention.png"
step attention-sweep 60 "$python" $attention --shapes packed-b32 --passes forward --sweep \
    --repeats 10 --csv "$out/attention-sweep.csv"
step loss 75 "$python" kernels/benchmarks/loss.py --hidden 960 2048 --vocab 49152 --rows 8192 \
    --csv "$out/loss.csv"
exit "$failed"
