#!/usr/bin/env bash
# One process, our pipeline, data parallel and torch's backprop pipelines on a 12-block ViT (width 192, 65 tokens, batch
# 64), one thread per rank; about half an hour on an idle machine of two cores.
#   python benchmarks/run.py benchmarks/pipeline-throughput [options of `layerwise bench scaling`]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
OPTIONS=("$@")
if [ ${#OPTIONS[@]} -eq 0 ]; then
    OPTIONS=(--model vit --depth 12 --batch-size 64 --rule sll --ranks 1,2,4 --micro-batches 4 --rounds 7 --steps 4
        --warmup 2 --simulate 64 --latency 0.05 --bandwidth 10)
fi
python -m layerwise bench scaling "${OPTIONS[@]}" --out "$scratch"
python "$here/../evidence.py" keep "$here" all_ways "$scratch/scaling.json" --command "layerwise bench scaling ${OPTIONS[*]}"
