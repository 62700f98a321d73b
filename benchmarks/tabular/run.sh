#!/usr/bin/env bash
# The table comes with scikit-learn. A minute or two on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/tabular/write.py
python benchmarks/grid.py benchmarks/tabular --jobs "${JOBS:-2}"
