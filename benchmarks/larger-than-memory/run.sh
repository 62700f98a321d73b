#!/usr/bin/env bash
# A Llama of a billion parameters, in one process and in two; an hour on two idle cores, 20 GiB of disk.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/larger-than-memory/measure.py "$@"
