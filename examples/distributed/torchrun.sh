#!/bin/sh
# One run on two machines of eight GPUs. Start it on both: FIRST=<address of the first> NODE=0 (on the other, NODE=1).
# Both need the same settings and data, and, to go on from a checkpoint, a file system in common for output_dir.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that a step and a save may take when it is asked to stop
exec torchrun --nnodes 2 --node-rank "$NODE" --nproc-per-node 8 --master-addr "$FIRST" --master-port 29500 \
  -m lowrank train run.yaml resume=true
