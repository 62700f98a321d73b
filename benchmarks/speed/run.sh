#!/usr/bin/env bash
# Interleaved time per step, ratios to backprop; needs no data. About ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")"
rules="sll local_ce backprop backprop_checkpoint"
measure() { # name, then options
    layerwise bench speed --rules $rules --threads 1 --json "$1.json" "${@:2}" | tee "$1.txt"
}
measure mlp3 --model mlp --shape 1 28 28 --batch-size 128 --rounds 24
measure vit12 --model vit --depth 12 --batch-size 64 --rounds 6
measure vit24 --model vit --depth 24 --batch-size 64 --rounds 4 --warmup 1
measure mlp24 --model mlp --depth 24 --shape 1 28 28 --batch-size 128 --rounds 10
python profile_step.py | tee profile.txt
