#!/usr/bin/env bash
# Throughput and memory of one rank: one process, --parallel data and --parallel sharded on two ranks; needs CIFAR-10.
# About eight minutes on two idle cores.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
TRAIN=(train --model vit --model.depth 12 --model.width 192 --model.heads 3 --rule local_ce --batch-size 64 --steps 40
    --train-samples 512 --threads 1 --device cpu --data cifar10)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for round in 1 2 3; do
    for way in none data sharded; do
        out=$scratch/$way-$round
        if [ "$way" = none ]; then
            command=(python -m layerwise "${TRAIN[@]}")
        else
            command=(torchrun --nproc-per-node 2 -m layerwise "${TRAIN[@]}" --parallel "$way")
        fi
        "${command[@]}" --out "$out"
        python "$here/../evidence.py" keep "$here" "$way-$round" "$out/result.json" --command "${command[*]}"
    done
done
