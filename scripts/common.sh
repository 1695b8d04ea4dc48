# Sourced by setup.sh and peers.sh: which Python, and what is needed to build the C parts of a dependency.
# shellcheck shell=bash

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# first_python NAME...: the first of these commands that starts; a name alone may be a version manager's shim.
first_python() {
  local name
  for name in "$@"; do
    if "$name" -c '' 2>/dev/null; then echo "$name"; return; fi
  done
  return 1
}

# need_to_build PYTHON WHAT COMMAND|HEADER...: install from the system's packages what is missing to build
# WHAT for PYTHON: a compiler, Python's headers and its venv module, and the C headers named.
need_to_build() {
  local python=$1 what=$2 version header missing=()
  shift 2
  version=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  command -v gcc >/dev/null || missing+=(gcc libc6-dev)
  for header in "$@"; do
    echo "#include <$header.h>" | gcc -E - >/dev/null 2>&1 || missing+=("lib$header-dev")
  done
  "$python" -c 'import os, sysconfig as s; raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
    missing+=("$version-dev")
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$version-venv")
  install_packages "to build $what" ${missing[@]+"${missing[@]}"}
}

# need_network_tools: what the tests use that build networks of their own, where this user may do that.
need_network_tools() {
  local missing=()
  unshare --net true 2>/dev/null || return 0
  PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null || missing+=(iproute2)
  PATH=$PATH:/usr/sbin:/sbin command -v nft >/dev/null || missing+=(nftables)
  install_packages "to build networks in tests" ${missing[@]+"${missing[@]}"}
}

# install_packages WHY PACKAGE...: from the system's packages, as root or by sudo.
install_packages() {
  local why=$1 install
  shift
  [ $# -gt 0 ] || return 0

  command -v apt-get >/dev/null || die "these are needed $why: $*"
  install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@")
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
      die "these are needed $why; as root: apt-get update && apt-get install -y --no-install-recommends $*"
    echo "$(basename "$0"): with sudo, installing $* ($why)"
    sudo apt-get update -qq
    sudo "${install[@]}" >/dev/null
  else
    echo "$(basename "$0"): installing $* ($why)"
    apt-get update -qq
    "${install[@]}" >/dev/null
  fi
}

# make_venv PYTHON FOLDER: a virtual environment with pip. One that an interrupted run left without is made anew.
make_venv() {
  "$2/bin/python" -m pip --version >/dev/null 2>&1 || "$1" -m venv --clear "$2"
}
