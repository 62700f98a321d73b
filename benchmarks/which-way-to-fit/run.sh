#!/usr/bin/env bash
# Memory and interleaved time of every way to fit five networks; needs no data. Half an hour on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/which-way-to-fit/measure.py "$@"
