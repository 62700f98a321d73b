#!/usr/bin/env bash
# Interleaved time per step, ratios to backprop, by depth; needs no data. About a quarter of an hour on one core.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
keep() { # name, command
    python "$here/../evidence.py" keep "$here" "$1" "$scratch/$1.json" --command "$2"
}
measure() { # name, then options
    options=(--rule sll sid local_ce backprop backprop_checkpoint --threads 1 "${@:2}")
    layerwise bench speed "${options[@]}" --json "$scratch/$1.json"
    keep "$1" "layerwise bench speed ${options[*]}"
}
measure mlp03 --model mlp --shape 1 28 28 --batch-size 128 --rounds 24
for depth in 4 12 24 64; do
    name=$(printf %02d "$depth")
    rounds=$((depth == 64 ? 6 : 10)) batch=$((depth == 64 ? 16 : 64)) # less work where a step takes long
    measure "mlp$name" --model mlp --depth "$depth" --shape 1 28 28 --batch-size 128 --rounds "$rounds"
    measure "conv$name" --model vgg --depth "$depth" --batch-size 32 --model.width 32 --rounds "$rounds"
    measure "vit$name" --model vit --depth "$depth" --batch-size "$batch" --rounds "$((rounds / 2))" --warmup 1
done
python "$here/profile_step.py" > "$scratch/profile.json"
keep profile "python benchmarks/time-per-step/profile_step.py"
