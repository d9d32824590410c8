#!/usr/bin/env bash
# One command from a clone to a trained, evaluated CodeBind bridge:
# virtual environment, install, data, training, evaluation, report.
# Usage: bash launch/quickstart.sh [WORKDIR] [--config.KEY=VALUE ...]
# Variables: PYTHON (interpreter, default python3), VENV (folder, default .venv), CONFIG (default configs/stage1.py).
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then workdir=$1; shift; fi
. launch/environment.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-}"
exec python -m codebind_jax.main --config="${CONFIG:-configs/stage1.py}" --workdir="$workdir" --config.test=True "$@"
