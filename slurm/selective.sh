#!/usr/bin/env bash
# The paper's run: distils on the language-heavy sources. One GPU of the A6000 class (48 GB).
#     sbatch slurm/selective.sh [arguments of train.py]      options: slurm/common.sh
#SBATCH --job-name=selective
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
source slurm/common.sh
train lingudistill zero2 "$@"
