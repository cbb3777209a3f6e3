#!/usr/bin/env bash
# The whole CI in one command: format, lint, types, floors, tests.
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
exec python -m pytest -n 2 --dist worksteal "$@"
