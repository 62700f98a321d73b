#!/usr/bin/env bash
# Needs the data set: from the hub, or from $LAYERWISE_DATA. About 5 core-minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/grid.py benchmarks/sid_depth --jobs "${JOBS:-2}"

# Exact memory and time per step, and the beliefs of one run of 20 modules.
here=benchmarks/sid_depth
layerwise bench memory --rule sid_cascade backprop --model sid_cascade --shape 1 28 28 --batch-size 128 --threads 1 \
    --depths 2,5,10,20,80 --model-options width 64 --json $here/memory.json | tee $here/memory.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
layerwise train --rule sid_cascade --data fashion_mnist --model sid_cascade --model.depth 20 --model.width 64 --steps 400 --lr 4e-3 \
    --precision bf16 --channels-last --val-fraction 0 --threads 1 --out "$scratch/run"
layerwise beliefs "$scratch/run" --json "$scratch/beliefs.json" --plot $here/beliefs.svg | tee $here/beliefs.txt
