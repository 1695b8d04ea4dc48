#!/usr/bin/env bash
# browser.sh: a Chromium for the tests of the dashboard, from the system's packages; `make browser` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
install_packages "to show the dashboard in tests" chromium fonts-dejavu-core
