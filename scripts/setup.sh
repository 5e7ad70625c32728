#!/usr/bin/env bash
# Make .venv and install a requirements file in the versions of constraints.txt; done again only when a file changed. Sourced.
#   VENV=DIR     another virtual environment    PYTHON=python3.12    another Python (3.11 to 3.13)
set -euo pipefail
# Many images set it. Each process would then compile torch and transformers anew at its start.
unset PYTHONDONTWRITEBYTECODE
requirements=$1
venv=${VENV:-.venv}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "error: $python is not Python 3.11, 3.12 or 3.13; name one with PYTHON=python3.12 bash scripts/..." >&2
  exit 2
fi
stamp=$venv/installed-$(cat requirements*.txt constraints.txt | cksum | cut -d' ' -f1)-$(basename "$requirements")
if [ ! -e "$stamp" ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  echo "installing $requirements into $venv"
  # Python compiles a module when it is first imported. pip would compile all 18,000, one after the other, for most of a minute.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar on --no-compile -r "$requirements" -c constraints.txt
  touch "$stamp"
fi
export PATH="$(cd "$venv/bin" && pwd):$PATH"
