#!/usr/bin/env bash
# Everything worth knowing about the kernels on one GPU, in at most 8 minutes, into one folder:
#
#     bash kernels/benchmarks/run_gpu.sh [results folder]
#
# Tests on the GPU first: a benchmark of a wrong kernel is worth nothing. They compile many kernels,
# so their groups run side by side; the benchmarks then run alone. Each step has a time limit, and
# the next one runs whatever became of it; the exit status is 1 when one failed. Needs torch, triton
# and pytest; matplotlib for the figures, flash-attn and liger-kernel to be compared with.
set -uo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-$(command -v python || command -v python3)}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' | tr -c 'A-Za-z0-9\n' '-')
if [ -z "$name" ]; then
    echo "$python sees no CUDA device; set PYTHON to an interpreter whose torch does" >&2
    exit 2
fi
out=${1:-kernels/benchmarks/results/$name}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_INTERPRET=0 # the tests fall back to the interpreter where they see no GPU
mkdir -p "$out"
# A second run replaces the first one's figures.
rm -f "$out"/{failed.txt,attention.csv,attention-sweep.csv,loss.csv}

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    { echo "$ $*"; timeout "$limit" "$@"; } > "$out/$name.txt" 2>&1
    status=$?
    echo "== $name: status $status after $((SECONDS - begin)) s (limit $limit s)"
    tail -5 "$out/$name.txt"
    [ "$status" -eq 0 ] || echo "$name: status $status" >> "$out/failed.txt"
}

{ timeout 5 nvidia-smi; timeout 20 "$python" -m torch.utils.collect_env; } > "$out/environment.txt" 2>&1
test=("$python" -m pytest -q -m gpu -p no:cacheprovider)
attention=tests/unit/kernels/test_shared_kv_attention_triton.py

step tests-attention-plain 140 "${test[@]}" $attention -k "table and plain" &
step tests-attention-second 140 "${test[@]}" $attention -k "table and second" &
step tests-attention 140 "${test[@]}" $attention -k "not table" &
step tests-loss 140 "${test[@]}" tests/unit/kernels/test_distill_loss_triton.py &
wait

# --seconds ends a benchmark before its limit does: what was begun last needs the difference.
step attention 180 "$python" kernels/benchmarks/attention.py --seconds 125 \
    --csv "$out/attention.csv" --plot "$out/attention.png"
step attention-sweep 45 "$python" kernels/benchmarks/attention.py --shapes packed-b32 --sweep \
    --passes forward --repeats 10 --seconds 28 --csv "$out/attention-sweep.csv"
step loss 80 "$python" kernels/benchmarks/loss.py --hidden 960 2048 --vocab 49152 \
    --rows 2048 8192 32768 --seconds 55 --csv "$out/loss.csv" --plot "$out/loss.png"

echo "results in $out"
if [ -e "$out/failed.txt" ]; then
    echo "failed:" && cat "$out/failed.txt"
    exit 1
fi
