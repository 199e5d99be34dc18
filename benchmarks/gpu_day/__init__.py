"""The day there is a GPU: what can be asked of one in nine minutes. `benchmarks/gpu_day.sh` runs it."""
