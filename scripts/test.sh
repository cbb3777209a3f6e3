#!/usr/bin/env bash
# The whole CI in one command: format, lint, types, floors, tests, and those of ZeRO where DeepSpeed
# can be installed.
#
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh -n 0 tests/test_x.py  arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
# Two workers, one thread each: tiny models gain nothing from more, and the distributed tests start
# two processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff format --check .
ruff check .
mypy
lint-imports --no-logo
if [ $# -gt 0 ]; then
  exec python -m pytest -n 2 --dist worksteal "$@"
fi
python -m pytest -n 2 --dist worksteal --ignore tests/zero3
# One after the other: each starts up to four processes.
if bash scripts/setup.sh zero3; then
  python -m pytest -n 0 tests/zero3
else
  echo "warning: DeepSpeed cannot be installed here, so that tests/zero3 did not run" >&2
fi
