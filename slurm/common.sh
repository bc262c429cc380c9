# shellcheck shell=bash
# What the jobs of this folder share; sourced by them, never submitted itself.
#
#   sbatch slurm/selective.sh                                 the paper's run on one GPU
#   sbatch slurm/selective.sh --learning_rate 5e-5            arguments go to train.py
#   RECIPE=my.yaml OUTPUT_DIR=/scratch/me/run sbatch --account=lab --time=12:00:00 slurm/uniform.sh
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/selective.sh     one rank a GPU
#   RECIPE=tiny sbatch --nodes=2 --gpus-per-node=0 slurm/selective.sh     CPU nodes, one rank each
#
# Cores come with the GPUs: --cpus-per-gpu, 8 in the scripts (not --cpus-per-task). A job without GPUs
# has one core a rank, or all of its nodes with --exclusive; on nodes of fewer than 8 cores SLURM wants
# --cpus-per-gpu=1 as well.
#
# Submit from the folder that holds slurm/ (the repository's root, or OUT of `ldistill scripts slurm
# --out OUT`), or with --chdir. Account, partition, QOS, time, memory,
# nodes and GPUs are sbatch flags (or SBATCH_ACCOUNT, SBATCH_PARTITION, ...); all else is a variable:
#
#   SETUP        shell code that makes `python` the right one: "module load cuda; source env/bin/activate"
#                (default: .venv, if there is one)
#   CONTAINER    what stands before each rank's command: "apptainer exec --nv ldistill.sif"
#   SRUN_FLAGS   more flags for srun: "--container-image=ldistill.sqsh --network=..."
#   RECIPE       name or file, instead of the script's own         OUTPUT_DIR  default runs/RECIPE
#   ZERO         DeepSpeed configuration, instead of the script's own
#   SHARDS       folder of shards, on every node; default shards, unless the recipe says where they
#                lie or makes its own, as tiny does
#   MASTER_ADDR, MASTER_PORT    where rank 0 listens; default the first node, another port each start
#   MAX_CRASHES  how often a crash without a new checkpoint in between is tried again, in the same
#                allocation (default 3), after BACKOFF seconds (default 30), then twice that, ...
#   MAX_REQUEUES how often the job may go back to the queue (default 100)
#
# A preempted job, or one 300 s before its time limit, saves a checkpoint, goes back to the queue
# and goes on in the same run folder, from its newest checkpoint: a --resume_from_checkpoint or
# --overwrite of the command counts until the job has saved one. More: docs/operations.md.

STOPPED=85   # ldistill.training.stopping.STOPPED_EXIT_CODE
MISTAKE=2    # train.py has said what to change; trying again would not help

[[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: submit this script with sbatch." >&2; exit $MISTAKE; }
# srun no longer inherits it; cores given by GPU are shared out over the tasks of a node.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / ${SLURM_NTASKS_PER_NODE:-1}))}
unset SLURM_CPUS_PER_GPU   # srun takes one of the two
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
eval "${SETUP-[[ ! -f .venv/bin/activate ]] || source .venv/bin/activate}"
# The repository's ldistill, or an installed one; that of a container is its own business.
[[ -n ${CONTAINER:-}${SRUN_FLAGS:-} || -f ldistill/train.py ]] || python -c 'import ldistill' 2>/dev/null ||
  { echo "error: no ldistill here: submit from the repository's root, or name an environment that has it in SETUP." >&2; exit $MISTAKE; }
asked_port=${MASTER_PORT:-}
starts=$((100 * ${SLURM_RESTART_COUNT:-0}))   # of this job's ranks; numbered, not counted

# train RECIPE ZERO [arguments of train.py]: a run, from its newest checkpoint if it has one.
train() {
  local recipe=${RECIPE:-$1} zero=${ZERO:-$2} shards crashes=0 told='' before again code
  shards=${SHARDS-$(has_shards "$recipe" || echo shards)}
  shift 2
  set -- --deepspeed "ds_configs/$zero.json" --recipe "$recipe" \
    --output_dir "${OUTPUT_DIR:-runs/$(basename "${recipe%.yaml}")}" \
    --resume_from_checkpoint auto ${shards:+--shards "$shards"} "$@"
  output=$(output_dir "$@")
  alone_in "$output"
  export LDISTILL_STOP_FILE=$PWD/slurm/logs/stop-$SLURM_JOB_ID
  export LDISTILL_EXIT_FILE=$PWD/slurm/logs/exit-$SLURM_JOB_ID
  rm -f "$LDISTILL_STOP_FILE" "$LDISTILL_EXIT_FILE"
  trap 'rm -f "$LDISTILL_STOP_FILE" "$LDISTILL_EXIT_FILE"; discard_buffers' EXIT
  trap 'told=1; touch "$LDISTILL_STOP_FILE"; echo "told to stop: $(date)"' USR1
  found=$PWD/slurm/logs/found-$SLURM_JOB_ID   # kept until all is done: one may requeue what failed
  [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -e $found ]] || manifests > "$found"
  while :; do
    before=$(newest) again=()
    # From here, a checkpoint named in the command or --overwrite would undo what the job has done.
    ! has_saved || again=(--resume_from_checkpoint auto --overwrite false)
    run_ranks python -u -m ldistill.train "$@" "${again[@]}"
    code=$?
    # srun's status may be that of ranks it killed because the first one had left.
    [[ ! -s $LDISTILL_EXIT_FILE ]] || code=$(<"$LDISTILL_EXIT_FILE")
    [[ $code -ne 0 ]] || rm -f "$found"
    [[ $code -ne 0 && $code -ne $MISTAKE ]] || exit "$code"
    [[ $code -ne $STOPPED ]] || requeue
    [[ $(newest) == "$before" ]] || crashes=0
    ((crashes++ < ${MAX_CRASHES:-3})) || { echo "error: crashed with $code $crashes times without getting further; not tried again." >&2; exit "$code"; }
    echo "crashed with $code; trying again in $((${BACKOFF:-30} << (crashes - 1))) s"
    pause $((${BACKOFF:-30} << (crashes - 1)))
    [[ -z $told ]] || requeue   # there may be no time for another start
  done
}

# Whether a recipe names its shards or makes them; of the shipped ones tiny alone does.
has_shards() { [[ $1 == tiny ]] || grep -qsE '^(shards|prepare):' "$1"; }

# The last one counts, as with every flag of train.py.
output_dir() {
  local folder
  while (($#)); do
    case $1 in
      --output[_-]dir) folder=$2 ;;
      --output[_-]dir=*) folder=${1#*=} ;;
    esac
    shift
  done
  echo "$folder"
}

# run_ranks COMMAND...: on every task of the job, as torch.distributed expects it. One rank's failure
# ends all. srun runs in the background, since a trap waits for what runs in the foreground.
run_ranks() {
  rm -f "$LDISTILL_EXIT_FILE"
  export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  # A rank that was killed may still hold the last start's; jobs beside this one have the next numbers.
  export MASTER_PORT=${asked_port:-$((20000 + (SLURM_JOB_ID + 997 * starts++) % 12000))}
  export LDISTILL_GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-0}
  LDISTILL_GPUS_PER_NODE=${LDISTILL_GPUS_PER_NODE##*:}   # a100:8
  # shellcheck disable=SC2016,SC2086
  srun --kill-on-bad-exit=1 ${SRUN_FLAGS:-} ${CONTAINER:-} bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
    exec "$@"' rank "$@" &
  pause_until_end $!
  local code=$?
  discard_buffers
  return $code
}

# DeepSpeed's shared memory of ranks on one CPU node: it never removes it, and a next start under the
# same port would meet it.
discard_buffers() { rm -f /dev/shm/deepspeed_allreduce_buffer_*_"${MASTER_PORT:-none}"_*; }

# Ends with the process's status. A trapped signal ends `wait` alone, with 128 and more.
pause_until_end() {
  local code
  while wait "$1"; code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do :; done
  return $code
}

# So many seconds, or until the job is told to stop.
pause() {
  local left=$1
  while ((left-- > 0)) && [[ -z $told ]]; do sleep 1; done
}

newest() { ls -d "$output"/checkpoint-* 2>/dev/null | sort -V | tail -n 1; }

# The complete checkpoints, each with its time: one of the same step may replace another.
manifests() { stat -c '%n %y' "$output"/checkpoint-*/manifest.json 2>/dev/null; }

# Whether there is a checkpoint that the job did not find when it first started.
has_saved() { manifests | grep -qvxFf "$found"; }

# Back to the queue; this script ends here, to be started again under the same job id.
requeue() {
  local anew=", without --overwrite or a checkpoint's name if it had them"
  if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
    echo "stopped, and back in the queue $SLURM_RESTART_COUNT times already: submit it again$anew." >&2
  elif echo "back to the queue: $(date)" && scontrol requeue "$SLURM_JOB_ID"; then   # may end it at once
    sleep 600   # SLURM ends it
  else
    echo "stopped, but SLURM does not take it back: submit the same command again$anew." >&2
  fi
  exit $STOPPED
}

# Two jobs that write to one run folder would ruin it.
alone_in() {
  local other
  mkdir -p "$1"
  other=$(cat "$1/slurm_job" 2>/dev/null)
  if [[ -n $other && $other != "$SLURM_JOB_ID" && -n $(squeue -h -t R,CG,S -j "$other" 2>/dev/null) ]]; then
    echo "error: job $other is writing to $1: wait for it, cancel it, or choose another OUTPUT_DIR." >&2
    exit $MISTAKE
  fi
  echo "$SLURM_JOB_ID" > "$1/slurm_job"
}

# on_one COMMAND...: once, on the job's first node.
on_one() {
  # shellcheck disable=SC2086
  srun --nodes=1 --ntasks=1 ${SRUN_FLAGS:-} ${CONTAINER:-} "$@"
}
