#!/usr/bin/env bash
# Memory and interleaved time of every way to fit four networks; needs no data. Under ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/which-way-to-fit/measure.py "$@"
