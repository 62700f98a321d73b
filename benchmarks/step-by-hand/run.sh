#!/usr/bin/env bash
# Processor time of a step against loops by hand, and of the cascade against its authors' two passes; five minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/step-by-hand/measure.py "$@"
