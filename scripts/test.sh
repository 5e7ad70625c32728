#!/usr/bin/env bash
# Set up, lint, check types, and run the test suite. Arguments go to pytest: bash scripts/test.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-dev.txt
ruff check .
ruff format --check .
basedpyright
python -m pytest "$@"
