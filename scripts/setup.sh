#!/usr/bin/env bash
# setup.sh VENV runtime|dev: makes the virtual environment of this project; `make run` and `make test` call it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 kind=$2
python=${PYTHON:-python3.11}

die() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || die "no $python on this machine: install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=..."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || die "$python is not Python 3.11 to 3.13"

# libp2p needs fastecdsa, which comes as C source: a compiler, Python's headers and GMP's are needed to build it.
header() { "$python" -c "import os, sysconfig; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_paths()['include'], '$1')))"; }
missing=()
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
echo '#include <gmp.h>' | gcc -E - >/dev/null 2>&1 || missing+=(libgmp-dev)
header Python.h || missing+=("$(basename "$(readlink -f "$(command -v "$python")")")-dev")
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$(basename "$(readlink -f "$(command -v "$python")")")-venv")
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "these are needed to build fastecdsa (a part of libp2p): ${missing[*]}"
  sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
  echo "setup: installing ${missing[*]} (to build fastecdsa, a part of libp2p)"
  $sudo apt-get update -qq
  $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q --upgrade 'pip>=25.1'
if [ "$kind" = dev ]; then
  "$venv/bin/python" -m pip install -q -c constraints.txt -e . --group dev
  touch "$venv/.dev"
else
  "$venv/bin/python" -m pip install -q -c constraints.txt -e .
fi
touch "$venv/.runtime"
