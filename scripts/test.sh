#!/usr/bin/env bash
# Set up, lint, check types, and run the test suite. Arguments go to pytest: bash scripts/test.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-dev.txt
ruff check .
ruff format --check .
report=$(mktemp) beside=$(mktemp)
trap 'kill $(jobs -p) 2> /dev/null || true; rm -f "$report" "$beside"' EXIT
basedpyright > "$report" 2>&1 & # on another core, while the tests run
types=$!
tests=0
if [ $# -eq 0 ]; then
  python -m pytest -m beside > "$beside" 2>&1 & # on another core, too
  pid=$!
  python -m pytest -m "not beside" || tests=$?
  wait "$pid" || tests=$?
  cat "$beside"
else
  python -m pytest "$@" || tests=$?
fi
if wait "$types"; then tail -n 1 "$report"; else cat "$report" && exit 1; fi
exit "$tests"
