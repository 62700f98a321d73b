#!/usr/bin/env bash
# Resident memory and time of blocks offloaded to disk; about ten minutes on two idle cores, 10 GiB of disk.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/offload-resident-memory/measure.py "$@"
