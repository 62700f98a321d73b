#!/usr/bin/env bash
# Memory and interleaved time of every way to fit four networks; needs no data. A quarter of an hour on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/which-way-to-fit/measure.py "$@"
