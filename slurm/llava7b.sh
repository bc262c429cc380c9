#!/usr/bin/env bash
# LLaVA 7B and its LM, 8 GPUs of 80 GB in one node.
#     sbatch slurm/llava7b.sh [arguments of train.py]        options: slurm/common.sh
#SBATCH --job-name=llava7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
source slurm/common.sh
train llava-7b zero3 "$@"
