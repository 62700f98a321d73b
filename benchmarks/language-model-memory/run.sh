#!/usr/bin/env bash
# Exact peak bytes of one training step of a language model by depth; needs no data. Some ten minutes on one core.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
options=(--model gpt --depths 4,16,64 --shape 1 1 128 --classes 32000 --batch-size 4 --model.width 64 --model.heads 4
    --threads 1 --rule local_ce:readout=shared local_ce:readout=low_rank solo:group=1:depth=0 solo:group=1:depth=1
    solo:group=1:depth=0:head=separate sll:readout=shared sll:readout=shared:head=separate sll:readout=random
    backprop backprop_checkpoint)
layerwise bench memory "${options[@]}" "$@" --json "$scratch/gpt.json"
python "$here/../evidence.py" keep "$here" gpt "$scratch/gpt.json" --command "layerwise bench memory ${options[*]} $*"
