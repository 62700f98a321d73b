#!/usr/bin/env bash
# Needs MNIST: from the hub, or from $LAYERWISE_DATA. About ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/mlp-permuted-inputs-plasticity/measure.py "$@"
python benchmarks/mlp-permuted-inputs-plasticity/plot.py
