#!/usr/bin/env bash
# From a fresh machine to a distilled model: makes .venv, installs, then runs scripts/quickstart.py.
#
#   bash scripts/quickstart.sh                 arguments go to scripts/quickstart.py
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh run
exec .venv/bin/python -m scripts.quickstart "$@"
