#!/usr/bin/env bash
# Join the slices that slurm/shards.sh built:   sbatch slurm/merge.sh shards/
#SBATCH --job-name=merge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=12:00:00
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --requeue --open-mode=append
source slurm/common.sh
on_one ldistill shards merge "$@"
