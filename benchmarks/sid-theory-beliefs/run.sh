#!/usr/bin/env bash
# What SID's theory says, measured module by module, and early exit; needs Fashion-MNIST. About four core-minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
TRAIN=(train --rule sid_cascade --model sid_cascade --model.depth 10 --model.width 64 --data fashion_mnist --batch-size 128
    --precision bf16 --channels-last --lr 1e-2 --steps 1000 --val-fraction 0 --threads 1)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for seed in 0 1 2; do
    python -m layerwise "${TRAIN[@]}" --seed "$seed" --out "$scratch/$seed"
    python -m layerwise beliefs "$scratch/$seed" --json "$scratch/seed$seed.json" --plot "$scratch/beliefs$seed.svg"
    python "$here/../evidence.py" keep "$here" "seed$seed" "$scratch/seed$seed.json" \
        --command "layerwise ${TRAIN[*]} --seed $seed; layerwise beliefs RUN"
done
cp "$scratch/beliefs0.svg" "$here/../../docs/images/beliefs.svg"
