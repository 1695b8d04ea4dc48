#!/usr/bin/env bash
# peers.sh VENV [RELEASES]: an environment with the stock peers that the interop tests talk to: Petals, and Hivemind,
# whose wheel holds the Go daemon. RELEASES names their versions; by default tests/interop/releases.txt.
# About a minute and 1.6 GB.
# They need Python 3.11, whichever version runs this project: for later ones the tokenizers and NumPy that they
# pin have no wheels. PEERS_PYTHON names it.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
venv=$1 releases=${2:-tests/interop/releases.txt}
python=${PEERS_PYTHON:-python3.11}

[ "$("$python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" = "(3, 11)" ] ||
  die "the stock peers of the tests need Python 3.11, and $python is not that: install it, or name it: make PEERS_PYTHON=...
(\`make run\` and \`make test-fast\` do without the stock peers.)"

need_to_build "$python" "cpufeature, a part of Petals"
make_venv "$python" "$venv"
"$venv/bin/python" -m pip install -q -r tests/interop/requirements.txt hivemind -c "$releases"
# Petals pins a Hivemind and a pydantic that are older than it needs, and no wheel of that Hivemind exists.
"$venv/bin/python" -m pip install -q --no-deps petals -c "$releases"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp tests/interop/stock/hivemind_names.py "$site/"
echo 'import hivemind_names' > "$site/hivemind_names.pth"
touch "$venv/.ready"
