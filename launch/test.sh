#!/usr/bin/env bash
# The whole test suite in the quickstart's environment plus the test extras.
# Usage: bash launch/test.sh [pytest arguments]. Variables: PYTHON, VENV as in quickstart.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="test"
. launch/environment.sh
export HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu
ruff check .
# A file's tests share runs and processes: they stay on one worker.
python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
