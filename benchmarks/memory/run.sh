#!/usr/bin/env bash
# Exact peak bytes of one training step by depth; needs no data. About ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")"
measure() { # name, model, then options
    layerwise bench memory --model "$2" --threads 1 --depths 4,12,24,64,256 --json "$1.json" "${@:3}" | tee "$1.txt"
}
measure mlp mlp --batch-size 64 --shape 1 28 28 --model-options width 256
measure conv vgg --batch-size 16 --model-options width 16
measure vit vit --batch-size 8 --model-options width 64 heads 2
python plot.py
python -c "from layerwise.runs.environment import environment, in_words; print(in_words(environment()))" > environment.txt
