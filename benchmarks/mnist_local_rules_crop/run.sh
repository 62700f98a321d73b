#!/usr/bin/env bash
# Needs the data set: from the hub, or from $LAYERWISE_DATA. About 40 core-minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/grid.py benchmarks/mnist_local_rules_crop --jobs "${JOBS:-2}"
