#!/usr/bin/env bash
# All of the paper's recipes, one task of an array each; run folders OUTPUT_DIR/RECIPE.
#     sbatch slurm/variants.sh [arguments of train.py]       options: slurm/common.sh
#     RECIPE="lingudistill mine.yaml" sbatch --array=0-1%1 slurm/variants.sh     these, one at a time
#SBATCH --job-name=variants
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm/logs/%x-%A_%a.log
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
#SBATCH --array=0-6
source slurm/common.sh
# shellcheck disable=SC2206  # several, between blanks
recipes=(${RECIPE:-nanovlm-full nanovlm-lang distill-full distill-lang lingudistill
  lingudistill-highkd lingudistill-lowkd})
RECIPE=${recipes[SLURM_ARRAY_TASK_ID]:?"there are ${#recipes[@]} recipes: --array=0-$((${#recipes[@]} - 1))"}
OUTPUT_DIR=${OUTPUT_DIR:-runs}/$(basename "${RECIPE%.yaml}")
train "$RECIPE" zero2 "$@"
