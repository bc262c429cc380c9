#!/usr/bin/env bash
# The evaluation suite, after a training job:
#     job=$(OUTPUT_DIR=runs/mine sbatch --parsable slurm/selective.sh)
#     OUTPUT_DIR=runs/mine sbatch --dependency=afterok:$job slurm/eval.sh [arguments of ldistill eval]
# STUDENT: a folder or hub id, instead of OUTPUT_DIR/student. SUITE: default paper; empty: none, with
# --tasks. EVAL_DIR: where results go, default OUTPUT_DIR/eval. Other options: slurm/common.sh
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=12:00:00
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --requeue --open-mode=append
source slurm/common.sh
recipe=${RECIPE:-lingudistill}
run=${OUTPUT_DIR:-runs/$(basename "${recipe%.yaml}")}
suite=${SUITE-paper}
on_one ldistill eval --student "${STUDENT:-$run/student}" ${suite:+--suite "$suite"} --out "${EVAL_DIR:-$run/eval}" "$@"
