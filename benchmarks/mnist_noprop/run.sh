#!/usr/bin/env bash
# Needs the data set: from the hub, or from $LAYERWISE_DATA.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/grid.py benchmarks/mnist_noprop --jobs "${JOBS:-1}"
