#!/usr/bin/env bash
# Measures one part on a GPU within some minutes, and keeps every row as soon as it is measured (bench/README.md):
#   bench/gpu_check.sh --part first --minutes 4 --out DIR
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec python3 -m bench.gpu_check "$@"
