#!/bin/sh
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=12:00:00
# Five minutes before the time is over Slurm asks all to stop: the step ends, the first process saves, and the job that
# is queued again goes on from there.
#SBATCH --signal=TERM@300 --requeue --open-mode=append
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280  # torchrun waits so long for that; its own patience is 30 seconds
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# `sh -c`: SLURM_NODEID is another on each machine
srun sh -c "torchrun --nnodes $SLURM_NNODES --node-rank \$SLURM_NODEID --nproc-per-node 8 \
  --master-addr $FIRST --master-port 29500 -m lowrank train run.yaml resume=true"
