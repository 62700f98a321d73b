#!/usr/bin/env bash
# Memory, time and gradients of three networks with replaced modules; needs no data. About ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/replacements-memory-gradient/measure.py "$@"
