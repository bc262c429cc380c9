#!/usr/bin/env bash
# LLaVA 13B and its LM, 4 nodes of 8 GPUs: ZeRO-3, parameters sharded within a node, the rest over
# all. With other than 8 GPUs a node, set zero_hpz_partition_size in a copy of the configuration:
#     ZERO=my_multinode sbatch --nodes=8 --gpus-per-node=4 --ntasks-per-node=4 slurm/llava13b.sh
#     sbatch slurm/llava13b.sh [arguments of train.py]       options: slurm/common.sh
#SBATCH --job-name=llava13b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=48:00:00
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
source slurm/common.sh
train llava-13b zero3_multinode --teacher_engine replicated "$@"  # sharded, it would cross nodes
