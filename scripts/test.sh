#!/usr/bin/env bash
# Set up, lint, check types, and run the test suite. Arguments go to pytest: bash scripts/test.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-dev.txt
ruff check .
ruff format --check .
report=$(mktemp) waiting=$(mktemp)
trap 'rm -f "$report" "$waiting"' EXIT
basedpyright > "$report" 2>&1 & # on another core, while the tests run
types=$!
tests=0
if [ $# -eq 0 ]; then
  python -m pytest -m waits > "$waiting" 2>&1 & # beside the others, which compute
  waits=$!
  python -m pytest -m "not waits" || tests=$?
  wait "$waits" || tests=$?
  cat "$waiting"
else
  python -m pytest "$@" || tests=$?
fi
if wait "$types"; then tail -n 1 "$report"; else cat "$report" && exit 1; fi
exit "$tests"
