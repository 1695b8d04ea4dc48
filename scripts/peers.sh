#!/usr/bin/env bash
# peers.sh VENV: an environment with the stock peers that the interop tests talk to: Petals 2.2.0.post1 and
# Hivemind 1.1.12 (its wheel holds the Go daemon). About a minute and 1.6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3.11}

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q -r tests/interop/requirements.txt
# Petals pins a Hivemind and a pydantic that are older than it needs, and no wheel of that Hivemind exists.
"$venv/bin/python" -m pip install -q --no-deps petals==2.2.0.post1
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp tests/interop/stock/hivemind_names.py "$site/"
echo 'import hivemind_names' > "$site/hivemind_names.pth"
touch "$venv/.ready"
