#!/usr/bin/env bash
# Needs the extra `graph`, and Cora: from $LAYERWISE_DATA, or downloaded by PyTorch Geometric.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/grid.py benchmarks/cora --jobs "${JOBS:-2}"
