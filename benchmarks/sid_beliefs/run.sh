#!/usr/bin/env bash
# What SID's theory says, measured module by module, and early exit; needs Fashion-MNIST. About four core-minutes.
set -euo pipefail
cd "$(dirname "$0")"
TRAIN=(train --rule sid_cascade --model sid_cascade --model.depth 10 --model.width 64 --data fashion_mnist --batch-size 128
    --precision bf16 --channels-last --lr 1e-2 --steps 1000 --val-fraction 0 --threads 1)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p raw
for seed in 0 1 2; do
    python -m layerwise "${TRAIN[@]}" --seed "$seed" --out "$scratch/$seed"
    python -m layerwise beliefs "$scratch/$seed" --json "raw/seed$seed.json" --plot "$scratch/beliefs$seed.svg"
done
cp "$scratch/beliefs0.svg" ../../docs/images/beliefs.svg
python -c "from layerwise.runs.environment import environment, in_words; print(in_words(environment()))" > environment.txt
python table.py
