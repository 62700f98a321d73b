#!/usr/bin/env bash
# Interleaved time per step, ratios to backprop, by depth; needs no data. About a quarter of an hour on one core.
set -euo pipefail
cd "$(dirname "$0")"
rules="sll sid local_ce backprop backprop_checkpoint"
measure() { # name, then options
    layerwise bench speed --rules $rules --threads 1 --json "$1.json" "${@:2}" | tee "$1.txt"
}
measure mlp03 --model mlp --shape 1 28 28 --batch-size 128 --rounds 24
for depth in 4 12 24 64; do
    name=$(printf %02d "$depth")
    rounds=$((depth == 64 ? 6 : 10)) batch=$((depth == 64 ? 16 : 64)) # less work where a step takes long
    measure "mlp$name" --model mlp --depth "$depth" --shape 1 28 28 --batch-size 128 --rounds "$rounds"
    measure "conv$name" --model vgg --depth "$depth" --batch-size 32 --model-options width 32 --rounds "$rounds"
    measure "vit$name" --model vit --depth "$depth" --batch-size "$batch" --rounds "$((rounds / 2))" --warmup 1
done
python profile_step.py | tee profile.txt
python -c "from layerwise.runs.environment import environment, in_words; print(in_words(environment()))" > environment.txt
