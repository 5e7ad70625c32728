#!/usr/bin/env bash
# Prove the CUDA path on a machine with a GPU (docs/performance.md). Installs nothing: it needs a python that has torch and transformers.
#   bash scripts/gpu_proof.sh                       all steps
#   bash scripts/gpu_proof.sh --only speed          the steps whose names begin so
#   PYTHON=/opt/venv/bin/python bash scripts/gpu_proof.sh
#   bash scripts/gpu_proof.sh --rehearse            every step with tiny sizes on the CPU: a test of this script, no proof
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  for python in .venv/bin/python python3 python; do
    "$python" -c 'import torch, transformers' 2> /dev/null && break
  done
fi
if ! "$python" -c 'import torch, transformers' 2> /dev/null; then
  echo "error: $python has no torch and transformers; name a python that has them with PYTHON=..." >&2
  exit 2
fi
exec "$python" -m tests.gpu.proof "$@"
