#!/usr/bin/env bash
# Sets up a virtual environment, then runs the linter and the tests.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]     e.g. -m slow, -k tokenizer, tests/model
#
# Without arguments every test runs that is not marked slow. Paths are relative to the repository.
#   QWEN3_JAX_VENV   folder of the virtual environment (default: .venv in the repository)
#   PYTHON           interpreter to make it with (default: a Python >= 3.11 on PATH)
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

# shellcheck source=launch/venv.sh
source "$repo/launch/venv.sh"
prepare_venv dev,tpu
prepare_sandbox
cd "$repo"
status=0
echo '== ruff check'
"$venv/bin/python" -m ruff check -q --output-format=concise . || status=$?
[ $# -gt 0 ] || set -- -n 2 --dist loadfile # two files at once
echo "== pytest $*"
"$venv/bin/python" -m pytest "$@" || exit # the linter's findings must not hide a failing test
[ "$status" -eq 0 ] || fail 'ruff check found faults; they are above the tests'
