#!/bin/sh
#SBATCH --array=1-16 --gpus=1 --time=4:00:00
# Sixteen tasks, each with its share of the sweep's candidates, on whatever machines are free, at whatever time.
#SBATCH --signal=TERM@120 --requeue --open-mode=append
# share=auto is the task's number of the array; resume=true goes on with a share that was stopped, and begins one that is
# new. `exec`: Slurm's signal reaches lowrank itself.
exec lowrank train sweep.yaml share=auto resume=true
# When they are done, or in between:   lowrank report runs/sweep
