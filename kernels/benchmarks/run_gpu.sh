#!/usr/bin/env bash
# Everything worth knowing about the kernels on one GPU, into one archive:
#
#     bash kernels/benchmarks/run_gpu.sh [measure|sweep|profile] [archive.tar.gz]
#
# measure   (the default, 8 minutes) tests, then the shapes of the goals beside other
#           implementations; says at the end which goals were not reached
# sweep     (10 minutes) other tiles and chunks, compiled in parallel first, sparse and dense, forward
#           and backward: what the fixed tables are made from
# profile   (8 minutes) Nsight Compute on the kernels that matter, the shapes of the goals once more,
#           whole training steps with and without the kernels
#
# Tests on the GPU come first: a benchmark of a wrong kernel is worth nothing. They compile much, and
# so do the benchmarks, which is done beside them; the benchmarks then run alone. Each step has a time
# limit, and the next one runs whatever became of it; the exit status is 1 when one failed. The archive
# (logs, CSV files, figures) is written anew after every step. Needs torch, triton and pytest;
# matplotlib for the figures, ldistill's own requirements for the training steps. Wheels of what is to
# be compared with and is not installed are taken from the folder PEERS, for this run alone.
set -uo pipefail
archive=${2:-}
case "$archive" in "" | /*) ;; *) archive=$PWD/$archive ;; esac
cd "$(dirname "$0")/../.." || exit

call=${1:-measure}
case "$call" in measure | sweep | profile) ;; *)
    echo "measure, sweep or profile, not '$call'" >&2
    exit 2
    ;;
esac
python=${PYTHON:-$(command -v python || command -v python3)}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' | tr -c 'A-Za-z0-9\n' '-')
if [ -z "$name" ]; then
    echo "$python sees no CUDA device; set PYTHON to an interpreter whose torch does" >&2
    exit 2
fi
archive=${archive:-$PWD/kernels/benchmarks/results/$name-$call.tar.gz}
mkdir -p "$(dirname "$archive")"
work=$(mktemp -d)
out=$work/$name-$call
mkdir "$out"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_INTERPRET=0 # the tests fall back to the interpreter where they see no GPU

pack() {
    tar -czf "$archive.part" -C "$work" "$name-$call" && mv "$archive.part" "$archive"
}

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
if [ -n "${PEERS:-}" ]; then
    peers=("$python" -m pip install -q --no-index --no-deps --target "$work/peers" "$PEERS"/*.whl)
    timeout 20 "${peers[@]}" > "$out/peers.txt" 2>&1
    export PYTHONPATH="$PYTHONPATH:$work/peers"
fi
attention=("$python" kernels/benchmarks/attention.py)
loss=("$python" kernels/benchmarks/loss.py)
grid=(--hidden 960 2048 --vocab 49152 --targets 256 2048 8192 32768)

# --seconds ends a benchmark before its limit does: what was begun last needs the difference.
measure() {
    local test=("$python" -m pytest -q -o addopts= -m gpu -p no:cacheprovider)
    local tests=tests/unit/kernels/test_shared_kv_attention_triton.py
    step tests-attention-plain 140 "${test[@]}" $tests -k "table and plain" &
    step tests-attention-second 140 "${test[@]}" $tests -k "table and second" &
    step tests-attention 140 "${test[@]}" $tests -k "not table" &
    step tests-loss 140 "${test[@]}" tests/unit/kernels/test_distill_loss_triton.py &
    step warm-attention 140 "${attention[@]}" --warm --workers 8 --seconds 110 &
    step warm-loss 140 "${loss[@]}" "${grid[@]}" --warm --workers 3 --seconds 110 &
    wait
    pack
    step attention 180 "${attention[@]}" --seconds 130 \
        --csv "$out/attention.csv" --plot "$out/attention.png"
    pack
    step loss 90 "${loss[@]}" "${grid[@]}" --seconds 62 --csv "$out/loss.csv" --plot "$out/loss.png"
    step goals 10 "$python" kernels/benchmarks/goals.py "$out/attention.csv" "$out/loss.csv"
}

sweep() {
    step attention-sweep 430 "${attention[@]}" --sweep --repeats 10 --seconds 385 \
        --shapes packed-b8-5tokens packed-b8-20percent dense-4k dense-4k-d128 \
        --csv "$out/attention-sweep.csv"
    pack
    step loss-sweep 105 "${loss[@]}" --sweep --hidden 960 2048 --vocab 49152 --targets 2048 8192 \
        --repeats 10 --seconds 80 --csv "$out/loss-sweep.csv"
}

profile() {
    local ncu=(ncu --clock-control none --set full --launch-skip 3 --launch-count 3)
    ncu+=(--kernel-name "regex:^(forward|backward|distill_targets)_kernel")
    step ncu-attention 70 "${ncu[@]}" -o "$out/attention" "${attention[@]}" --providers ours \
        --shapes packed-b8-5tokens --repeats 2
    pack
    step ncu-loss 70 "${ncu[@]}" -o "$out/loss" "${loss[@]}" --providers ours --hidden 960 \
        --vocab 49152 --targets 2048 --kinds distill --repeats 2
    pack
    step attention 120 "${attention[@]}" --seconds 75 --csv "$out/attention.csv" \
        --shapes packed-b32 packed-b8-5tokens packed-b8-20percent dense-4k dense-4k-d128
    step loss 60 "${loss[@]}" "${grid[@]}" --seconds 35 --csv "$out/loss.csv"
    step goals 10 "$python" kernels/benchmarks/goals.py "$out/attention.csv" "$out/loss.csv"
    pack
    local train=("$python" -m ldistill.cli bench step --pair nanovlm-460m --rows 8 --steps 5)
    for kernels in auto reference; do
        step "step-$kernels" 45 "${train[@]}" --kernels $kernels --csv "$out/step-$kernels.csv"
    done
}

"$call"
[ ! -e "$out/failed.txt" ] || { echo "failed:" && cat "$out/failed.txt"; }
pack
echo "results in $archive"
[ ! -e "$out/failed.txt" ]
