#!/usr/bin/env bash
# Installs Menma into a virtual environment of its own. Can be run again; fast when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

TORCH_VERSION=2.13.0

usage() {
  cat <<'USAGE'
Usage: bash install.sh [options] [-- pytest arguments]

  --demo            install, then run the whole pipeline on the embedded model (menma demo)
  --test            install with the test extra, then run the tests
  --dev             install with the tools of a contributor (tests, ruff, mypy, import-linter)
  --venv DIR        where the virtual environment goes (default: .venv)
  --python PY       the Python to build it from (default: the first of 3.11 and newer on PATH)
  --cpu             the CPU build of torch, for a machine without an NVIDIA GPU
  --torch-index URL package index to take torch from (PyTorch's own ones have a build per CUDA version)
  -h, --help        this text
USAGE
}

say() { printf '%s\n' "menma: $*"; }
fail() {
  printf '%s\n' "menma: $1" >&2
  [ $# -lt 2 ] || printf '%s\n' "       $2" >&2
  exit 2
}

demo='' test='' dev='' cpu='' venv=.venv python='' torch_index=''
pytest_arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --demo) demo=1 ;;
    --test) test=1 ;;
    --dev) dev=1 ;;
    --cpu) cpu=1 ;;
    --venv | --python | --torch-index)
      [ $# -ge 2 ] || fail "$1 needs a value" "bash install.sh --help"
      case $1 in
        --venv) venv=$2 ;;
        --python) python=$2 ;;
        --torch-index) torch_index=$2 ;;
      esac
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    --) shift; pytest_arguments=("$@"); break ;;
    *) fail "unknown option $1" "bash install.sh --help lists them" ;;
  esac
  shift
done

usable_python() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if usable_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer with its venv module was found" \
    "install one (Debian, Ubuntu: sudo apt install python3 python3-venv) or name it: --python /path/to/python3.11"
}

make_environment() {
  if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  if [ -n "$python" ]; then
    usable_python "$python" || fail "$python is not a Python 3.11 or newer with its venv module"
  else
    python=$(find_python)
  fi
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
}

extras=bnb,optimizers,logging
[ -z "$test$dev" ] || extras=$extras,test
[ -z "$dev" ] || extras=$extras,dev
torch_requirement=torch==$TORCH_VERSION
[ -z "$cpu" ] || torch_requirement=$torch_requirement+cpu

# What an environment was made from. An environment with more extras serves for fewer as well.
stamp=$venv/.menma-installed
fingerprint() {
  "$venv/bin/python" -c '
import hashlib, sys
print(sys.argv[1], hashlib.sha256(b"".join(open(p, "rb").read() for p in sys.argv[2:])).hexdigest())
' "$torch_requirement $torch_index $PWD" pyproject.toml constraints.txt
}

installed() {
  [ -f "$stamp" ] && [ -x "$venv/bin/menma" ] || return 1
  [ "$(sed -n 1p "$stamp")" = "$(fingerprint)" ] || return 1
  local extra
  for extra in ${extras//,/ }; do
    sed -n 2p "$stamp" | tr , '\n' | grep -qx "$extra" || return 1
  done
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@"; }

install_packages() {
  if installed; then
    say "$venv is up to date"
    return
  fi
  rm -f "$stamp"
  say "installing $torch_requirement (some GiB where it is the CUDA build)"
  # --extra-index-url: torch's own index does not hold everything that torch needs.
  pip_install -c constraints.txt ${torch_index:+--extra-index-url "$torch_index"} "$torch_requirement" \
    || fail "torch could not be installed" \
      "is there a network? For another build: --torch-index URL, as given on PyTorch's start page"
  say "installing Menma [$extras]"
  pip_install -c constraints.txt -e ".[$extras]" \
    || fail "a package could not be installed" "the lines above say which; run this script again afterwards"
  printf '%s\n%s\n' "$(fingerprint)" "$extras" >"$stamp"
}

make_environment
install_packages

if [ -n "$demo" ]; then
  say "running: $venv/bin/menma demo"
  "$venv/bin/menma" demo
fi
if [ -n "$test" ]; then
  # A worker a core, four at most: each of them is a torch of its own. By file: what a file's tests
  # share is made once.
  pytest=("$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile)
  pytest+=(--no-loadscope-reorder)
  pytest+=(${pytest_arguments[@]+"${pytest_arguments[@]}"})
  say "running: ${pytest[*]}"
  exec "${pytest[@]}"
fi

say "done. Next:"
say "  source $venv/bin/activate"
if [ -n "$demo" ]; then say "  menma new --help"; else say "  menma demo"; fi
