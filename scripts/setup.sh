#!/usr/bin/env bash
# Finds a Python 3.11 and hands over to setup.py, which makes .venv. PYTHON= names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_python_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

for candidate in ${PYTHON:-.venv/bin/python python3.11 /usr/bin/python3.11 python3 python}; do
  if is_python_311 "$candidate"; then
    exec "$candidate" scripts/setup.py "$@"
  fi
done

echo "diwa: Python 3.11 is needed (pybullet has no wheels for later ones), found none in: ${PYTHON:-python3.11 python3 python}." >&2
echo "      Install it (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11 ..." >&2
exit 1
