#!/usr/bin/env bash
# Makes .venv and installs llm_distill into it. When nothing has changed since, it returns at once.
#
#   bash scripts/setup.sh                      with the developer tools (same as `dev`)
#   bash scripts/setup.sh run                  without them
#   bash scripts/setup.sh zero3                .zero3 besides, with DeepSpeed, for tests/zero3
#   PYTHON=/path/to/python3.12 bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.venv
readonly python="$venv/bin/python"
readonly constraints=scripts/constraints.txt
readonly zero3=.zero3
readonly pins=scripts/zero3.txt
# Stands while an install runs. If it is still there at the next call, that install was killed and
# may have left half a package, which pip would take for a whole one.
readonly unfinished="$venv/.llm-distill-unfinished"

say() { printf '==> %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# What the install depends on. The folder too: a moved .venv points to where it was.
fingerprint() { { pwd && cat pyproject.toml "$constraints"; } | cksum; }
stamp_of() { printf '%s/.llm-distill-%s' "$venv" "$1"; }
is_installed() { [ -f "$(stamp_of "$1")" ] && [ "$(cat "$(stamp_of "$1")")" = "$(fingerprint)" ]; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# A .venv made by uv has no pip, which is no reason to throw it away: the second line gives it one.
venv_works() {
  "$python" -m pip --version >/dev/null 2>&1 ||
    "$python" -m ensurepip >/dev/null 2>&1
}

# The first Python that is new enough; `python3` is the one people mean.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then
      printf '%s' "$candidate"
      return
    fi
  done
  die "llm_distill needs Python 3.11 or newer; python3 here is" \
    "$(python3 --version 2>/dev/null || printf 'missing')." \
    "Install one, or name one: PYTHON=/path/to/python3.12 bash scripts/setup.sh"
}

make_venv() {
  local base package
  base=$(find_python)
  if ! "$base" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    # Debian and Ubuntu split these two modules off, into a package named after the Python.
    package="python$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    die "$base cannot make virtual environments: it has no ensurepip." \
      "On Debian and Ubuntu: sudo apt install $package (or python3-venv)"
  fi
  say "Making $venv with $("$base" --version)"
  rm -rf "$venv"
  mkdir "$venv"
  : >"$unfinished"
  "$base" -m venv "$venv"
}

pip_install() { "$python" -m pip install --disable-pip-version-check "$@"; }

# torch first and alone: it is the large one, and the one a new Python may not have a wheel for.
install() {
  local target=$1 torch
  torch=$(grep '^torch==' "$constraints")
  if pip_install -c "$constraints" "$torch"; then
    pip_install -c "$constraints" -e "$target"
  else
    say "$torch cannot be installed here; trying the ranges of pyproject.toml"
    pip_install -e "$target"
  fi
}

# DeepSpeed in a folder of its own, with the one extension that gloo needs, compiled. A compilation
# that was killed leaves a lock behind which all later ones wait for: then it starts from nothing.
install_zero3() {
  local stamp="$zero3/.complete" print
  print=$({ pwd && cat "$pins"; } | cksum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$print" ]; then
    return
  fi
  rm -rf "$zero3"
  mkdir "$zero3"
  say "Installing DeepSpeed into $zero3"
  pip_install setuptools
  pip_install --no-deps --no-build-isolation --target "$zero3/site" -r "$pins" ||
    die "the installation failed; pip's message is above"
  say "Compiling its extension; this takes a minute"
  PATH="$PWD/$venv/bin:$PWD/$zero3/site/bin:$PATH" PYTHONPATH="$PWD/$zero3/site" \
    DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/$zero3/extensions" "$python" -c \
    'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()' ||
    die "DeepSpeed's extension does not compile; it needs a C++ compiler (on Debian: g++)"
  printf '%s' "$print" >"$stamp"
  say "Installed into $zero3"
}

main() {
  local kind=${1:-dev} target
  case $kind in
    dev) target='.[dev]' ;;
    run) target='.' ;;
    zero3)
      main dev
      install_zero3
      return
      ;;
    *)
      die "no kind of install '$kind'; there are 'dev' (with the developer tools), 'run', and" \
        "'zero3' (DeepSpeed besides)"
      ;;
  esac
  # A dev install serves `run` as well.
  if venv_works && { is_installed "$kind" || is_installed dev; }; then
    return
  fi
  trap 'exit 130' INT # pip turns Ctrl-C into an ordinary failure; it is a kill all the same
  if [ -e "$unfinished" ]; then
    say "An earlier install was interrupted; starting again"
    make_venv
  elif ! venv_works; then
    make_venv
  fi
  is_new_enough "$python" || die "$venv has $("$python" --version), and llm_distill needs 3.11 or" \
    "newer. Remove $venv, and the same command makes a new one"
  : >"$unfinished"
  say "Installing llm_distill and its dependencies; torch is large, this takes some minutes"
  if ! install "$target"; then
    rm -f "$unfinished" # pip failed by itself, and tidied up behind itself
    die "the installation failed; pip's message is above. The same command continues it"
  fi
  fingerprint >"$(stamp_of "$kind")"
  rm -f "$unfinished"
  say "Installed into $venv"
}

main "$@"
