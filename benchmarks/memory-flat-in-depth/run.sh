#!/usr/bin/env bash
# Exact peak bytes of one training step by depth; needs no data. About ten minutes on one core.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
measure() { # name, model, then options
    options=(--model "$2" --threads 1 --depths 4,12,24,64,256 "${@:3}")
    layerwise bench memory "${options[@]}" --json "$scratch/$1.json"
    python "$here/../evidence.py" keep "$here" "$1" "$scratch/$1.json" --command "layerwise bench memory ${options[*]}"
}
measure mlp mlp --batch-size 64 --shape 1 28 28 --model.width 256
measure conv vgg --batch-size 16 --model.width 16
measure vit vit --batch-size 8 --model.width 64 --model.heads 2
python "$here/plot.py"
