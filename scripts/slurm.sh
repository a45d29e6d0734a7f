#!/usr/bin/env bash
# Trains on the GPUs of several Slurm nodes, from the repository's root:
#
#   sbatch --nodes=2 scripts/slurm.sh --config=configs/lits.py --config.data.root=DIR \
#     --config.data.store=STORE --workdir=DIR --config.model.sam_weights=FILE \
#     --config.train.batch_labelled=8 --config.train.batch_unlabelled=8 \
#     --config.log.validate_every_steps=750 --config.checkpoint.every_steps=250
#
# One GPU: sbatch --nodes=1 --ntasks-per-node=1 --gres=gpu:1, and no batch to give.
#
# What follows the script's name is the program's. PYTHON names another interpreter than .venv's;
# DRY_RUN=1 prints the srun command and runs nothing. DIR must be on a file system that all nodes see.
#
# One task a GPU is what jax.distributed.initialize() expects under Slurm: each task takes the GPU
# of its local rank, so all of a node's GPUs must stay visible to it (no --gpus-per-task).
#SBATCH --job-name=sammix
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Without B: the tasks get SIGTERM, not this script; they save, and exit with 143.
#SBATCH --signal=TERM@120
set -euo pipefail

# A task that fails must not make srun end the others by SIGTERM: they would exit with 143, and the
# failure would be requeued for ever. JAX ends them, since one of their number is gone.
# And srun does not take the number of cores over from sbatch.
run=(srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}"
  "${PYTHON:-.venv/bin/python}" -m sammix_jax.main "$@")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${run[@]}"
  echo
  exit
fi

code=0
"${run[@]}" || code=$?
# A job that was cancelled, or that Slurm requeues itself, is no longer RUNNING: leave it alone.
if [[ $code == 143 && $(scontrol show job --oneliner "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
  echo "slurm.sh: stopped after a save; requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
