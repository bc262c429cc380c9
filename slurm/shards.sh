#!/usr/bin/env bash
# Data preparation on any number of nodes: an array whose tasks share out the sources, or slices of
# them. The result is the same, byte for byte, as one machine's.
#     sbatch slurm/shards.sh --dataset HuggingFaceM4/the_cauldron --out shards/
#     job=$(SLICES=8 sbatch --parsable --array=0-31 slurm/shards.sh --dataset cauldron/ --out shards/)
#     sbatch --dependency=afterok:$job slurm/merge.sh shards/
# SOURCES: full (the 17), lang or a,b,c. SLICES: parts of every source, default 1; with more, let
# merge.sh join them. Arguments go to `ldistill shards build`. Other options: slurm/common.sh
# Some tasks again, of an array 0-31:
#     TASKS=32 SLICES=8 sbatch --array=3,7 slurm/shards.sh --dataset cauldron/ --out shards/
#SBATCH --job-name=shards
#SBATCH --array=0-16
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=slurm/logs/%x-%A_%a.log
#SBATCH --requeue --open-mode=append
source slurm/common.sh
# Which of how many tasks this is. A list (3,7) would pass for a whole array and leave units out.
tasks=$SLURM_ARRAY_TASK_COUNT step=${SLURM_ARRAY_TASK_STEP:-1}
number=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / step))
if [[ -n ${TASKS:-} ]]; then
  tasks=$TASKS number=$SLURM_ARRAY_TASK_ID
  ((number < tasks)) || { echo "error: TASKS=$tasks are numbered 0-$((tasks - 1)): there is no $number." >&2; exit $MISTAKE; }
elif ((SLURM_ARRAY_TASK_MIN + step * (tasks - 1) != SLURM_ARRAY_TASK_MAX)); then
  echo "error: --array is a list. To run some tasks of an array 0-63 again, submit with TASKS=64." >&2
  exit $MISTAKE
fi
names=$(on_one python -c 'import sys; from ldistill.sources import SUBSETS, resolve_sources, split_names
asked = sys.argv[1]
print(*(resolve_sources if asked in SUBSETS else split_names)(asked))' "${SOURCES:-full}") || exit
units=()
for source in $names; do
  for ((i = 1; i <= ${SLICES:-1}; i++)); do units+=("$source $i/${SLICES:-1}"); done
done
for ((u = number; u < ${#units[@]}; u += tasks)); do
  read -r source slice <<< "${units[u]}"
  echo "$source, slice $slice"
  [[ $slice == 1/1 ]] || slicing=(--slice "$slice")
  on_one ldistill shards build --sources "$source" "${slicing[@]}" "$@" || exit
done
