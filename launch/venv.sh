# shellcheck shell=bash
# Sourced by local.sh and test.sh, which set $repo. prepare_venv EXTRAS makes or reuses the virtual
# environment $QWEN3_JAX_VENV (default: .venv in the repository) with qwen3_jax and its EXTRAS
# ('' or 'dev,tpu') installed, and leaves its folder in $venv. $PYTHON chooses the interpreter.
# prepare_sandbox installs bubblewrap, in which code that a model wrote is run, where it may.

fail() {
  echo "error: $*" >&2
  exit 1
}

is_supported() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints an interpreter of Python 3.11 or later, each tried: a name on PATH may be a shim that cannot run.
find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or later ($("$PYTHON" -V 2>&1 || true))"
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11; do
    if is_supported "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python 3.11 or later on PATH (python3 is $(python3 -V 2>&1 || true)); install one or set PYTHON=/path/to/python"
}

minor_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

# True where the folder $1 is a virtual environment that runs and is of the version $2 (any, if empty).
is_usable() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1 &&
    { [ -z "$2" ] || [ "$(minor_version "$1/bin/python")" = "$2" ]; }
}

make_venv() {
  local python
  python=$(find_python)
  echo "== making a virtual environment in $venv ($("$python" -V))"
  if ! "$python" -m venv --clear "$venv"; then
    fail "$python cannot make virtual environments (on Debian and Ubuntu: apt-get install python3-venv)"
  fi
  touch "$venv/.made-by-qwen3_jax"
}

prepare_venv() {
  local extras=$1 python wanted='' version stamp hash requirement=jax
  venv=${QWEN3_JAX_VENV:-$repo/.venv}
  [[ $venv = /* ]] || venv=$PWD/$venv
  if [ -n "${PYTHON:-}" ]; then
    python=$(find_python)
    wanted=$(minor_version "$python")
  fi
  if ! is_usable "$venv" "$wanted"; then
    if [ -e "$venv" ] && [ -n "$(ls -A "$venv")" ] && [ ! -e "$venv/.made-by-qwen3_jax" ] &&
      [ "$venv" != "$repo/.venv" ]; then
      fail "$venv exists and is no virtual environment of Python ${wanted:-3.11 or later}; name another in QWEN3_JAX_VENV"
    fi
    make_venv
  fi
  is_supported "$venv/bin/python" || fail "$venv has $("$venv/bin/python" -V); want Python 3.11 or later"

  version=$(minor_version "$venv/bin/python")
  if [ "$version" = 3.11 ]; then
    requirement=jax==0.10.2 # the last JAX for Python 3.11
  fi
  stamp=$venv/.installed-${extras:-base}
  hash=$(cd "$repo" && { cat setup.py launch/venv.sh && echo "$repo $version"; } | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
    echo "== reusing the virtual environment $venv (Python $version)"
    return
  fi
  echo "== installing qwen3_jax${extras:+[$extras]} and $requirement into $venv (a minute or two)"
  local install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check -e "$repo${extras:+[$extras]}" "$requirement")
  if ! "${install[@]}"; then
    echo '== that failed; trying once more'
    "${install[@]}" || fail 'pip could not install the packages; its messages are above'
  fi
  echo "$hash" >"$stamp"
}

# Never fails: what needs no model-written code works without, and what does says so itself.
prepare_sandbox() {
  local install=(apt-get)
  if command -v bwrap >/dev/null; then
    return
  fi
  if [ "$(id -u)" -ne 0 ]; then
    install=(sudo -n apt-get)
  fi
  echo '== installing bubblewrap, in which code that a model wrote is run'
  if ! "${install[@]}" -qq install -y --no-install-recommends bubblewrap >/dev/null 2>&1 &&
    ! { "${install[@]}" -qq update && "${install[@]}" -qq install -y --no-install-recommends bubblewrap; } >/dev/null 2>&1; then
    echo 'note: bubblewrap could not be installed: rewards of written code will refuse to start, and their tests skip (fail where CI is set); on Debian and Ubuntu: sudo apt-get install bubblewrap'
  fi
}
