#!/usr/bin/env bash
# wheelhouse.sh FOLDER cpu|cuda: fills FOLDER with wheels of this project and of all it needs, for this machine's
# kind of processor and system and for PYTHON (python3.11 unless set). What is installed from there needs no network:
# pip install --no-index --find-links FOLDER kwaainet-bridge
# TORCH_INDEX names where torch without CUDA comes from, if not from PyTorch's own index; empty: from pip's own.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
[ $# = 2 ] || die "usage: wheelhouse.sh FOLDER cpu|cuda"
folder=$1 kind=$2
case $kind in
  cpu) index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu} ;;
  cuda) index='' ;;
  *) die "$kind: cpu or cuda" ;;
esac
python=${PYTHON:-python3.11}
need_to_build "$python" "fastecdsa, a part of libp2p" gmp

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make_venv "$python" "$work/venv"
pip=("$work/venv/bin/python" -m pip)
"${pip[@]}" install -q --upgrade 'pip>=25.1'
mkdir -p "$folder"
# torch comes first, by itself: of the index without CUDA nothing else is to be taken
if [ -n "$index" ]; then
  "${pip[@]}" wheel -q -w "$folder" -c constraints.txt --no-deps --index-url "$index" torch
fi
# from a copy, since a build leaves files beside the sources, and takes those that an earlier one left
mkdir "$work/source"
cp -r pyproject.toml README.md LICENSE src "$work/source"
# pip keeps to the wheel of torch that is there, since a local version is above the same one without CUDA
"${pip[@]}" wheel -q -w "$folder" -c constraints.txt --find-links "$folder" "$work/source"

wheels=("$folder"/*.whl) cuda_libraries=$(find "$folder" -name 'nvidia*')
[ "$kind" = cuda ] || [ -z "$cuda_libraries" ] ||
  die "$folder holds CUDA's libraries, which kind cpu is to do without: empty it, or see TORCH_INDEX"
echo "wheelhouse.sh: ${#wheels[@]} wheels, $(du -sm "$folder" | cut -f1) MB, in $folder"
