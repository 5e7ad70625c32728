#!/usr/bin/env bash
# Set up, lint, check types, and run the test suite. Arguments go to pytest: bash scripts/test.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-dev.txt
ruff check .
ruff format --check .
report=$(mktemp)
trap 'kill $(jobs -p) 2> /dev/null || true; rm -f "$report"' EXIT
basedpyright > "$report" 2>&1 & # while the tests run
types=$!
tests=0
if [ $# -eq 0 ]; then
  # Three processes, for on two cores one of them often waits; the tests of a file share what they start. tests/conftest.py
  # orders the files, the longest first.
  python -m pytest -n 3 --dist loadfile --no-loadscope-reorder || tests=$?
else
  python -m pytest "$@" || tests=$?
fi
if wait "$types"; then tail -n 1 "$report"; else cat "$report" && exit 1; fi
exit "$tests"
