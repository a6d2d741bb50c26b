#!/usr/bin/env bash
# Sets up a virtual environment, then trains a tiny Qwen3 through the whole recipe on this machine.
#
#   bash launch/local.sh [WORKDIR] [ARGUMENTS]     e.g. runs/mine --config.seed=1
#
# WORKDIR is where everything is written (default: runs/tiny in the repository); run again with the
# same one, an interrupted recipe continues. ARGUMENTS go to `python -m qwen3_jax recipe`.
#   QWEN3_JAX_VENV   folder of the virtual environment (default: .venv in the repository)
#   PYTHON           interpreter to make it with (default: a Python >= 3.11 on PATH)
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
  '' | -*) workdir=$repo/runs/tiny ;;
  *)
    workdir=$1
    shift
    ;;
esac

# shellcheck source=launch/venv.sh
source "$repo/launch/venv.sh"
prepare_venv ''
prepare_sandbox
echo "== python -m qwen3_jax recipe --config=configs/recipe.py:tiny --workdir=$workdir $*"
exec "$venv/bin/python" -m qwen3_jax recipe --config="$repo/configs/recipe.py:tiny" \
  --workdir="$workdir" "$@"
