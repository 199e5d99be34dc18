#!/usr/bin/env bash
# Nine minutes on one GPU, without network: what lowrank does there, beside its peers, as JSON and a page.
#
#   bash benchmarks/gpu_day.sh --out FOLDER       on the GPU; wheels in .whl/ are installed first, beside the system's
#   bash benchmarks/gpu_day.sh --rehearse         the same script on a processor, with tiny shapes, in under 3 minutes
#   python -m benchmarks.gpu_day.wheels --have NAMES --out .whl      before: what the machine with the GPU lacks
#
# PYTHON: another interpreter than python3. Everything that was measured is on disk at every moment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=(.whl/*.whl)
site=
if [ -e "${wheels[0]}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${wheels[@]}"
fi
export PYTHONPATH="$PWD${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec "$python" -m benchmarks.gpu_day "$@"
