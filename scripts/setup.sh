#!/usr/bin/env bash
# setup.sh VENV runtime|dev: makes the virtual environment of this project; `make run` and `make test` call it.
# PYTHON names the interpreter; without it the first of Python 3.11, 3.12 and 3.13 that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
venv=$1 kind=$2

python=${PYTHON:-$(first_python python3.11 python3.12 python3.13)} ||
  die "no python3.11, python3.12 or python3.13 on this machine: install one, or name it: make PYTHON=..."
"$python" -c '' 2>/dev/null || die "$python does not start: make PYTHON=... names another"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || die "$python is not Python 3.11 to 3.13"

# libp2p needs fastecdsa, which comes as C source that uses GMP
need_to_build "$python" "fastecdsa, a part of libp2p" gmp
[ "$kind" != dev ] || need_network_tools
make_venv "$python" "$venv"
"$venv/bin/python" -m pip install -q --upgrade 'pip>=25.1'
if [ "$kind" = dev ]; then
  "$venv/bin/python" -m pip install -q -c constraints.txt -e . --group dev
  touch "$venv/.dev"
else
  "$venv/bin/python" -m pip install -q -c constraints.txt -e .
fi
touch "$venv/.runtime"
