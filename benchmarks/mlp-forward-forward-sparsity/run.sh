#!/usr/bin/env bash
# Needs MNIST: from the hub, or from $LAYERWISE_DATA. About ten minutes on one thread.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/mlp-forward-forward-sparsity/measure.py "$@"
