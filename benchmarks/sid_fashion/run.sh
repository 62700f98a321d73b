#!/usr/bin/env bash
# Needs the data set: from the hub, or from $LAYERWISE_DATA. About 45 core-minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/grid.py benchmarks/sid_fashion --jobs "${JOBS:-2}"
