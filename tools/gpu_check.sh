#!/usr/bin/env bash
# Checks this repository on a machine with an NVIDIA GPU; no network needed.
#   tools/gpu_check.sh OUT [STAGE...]             every stage, or those named; OUT/<stage>.json each
#   tools/gpu_check.sh --dry-run OUT [STAGE...]   the same without a GPU: compiles, launches nothing
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
rooms="$root/tools:$root:$root/tests:$root/tests/support"
export PYTHONPATH="$rooms${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m gpu_check "$@"
