#!/usr/bin/env bash
# Ten clients on 10,000 images of MNIST, alike and skewed, local losses beside backprop; took 20 minutes on two busy cores.
# Needs the virtual environment of examples/federated/README.md, and MNIST under $LAYERWISE_DATA.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
runs=()
for seed in 0 1 2; do
    for alpha in 0.0 0.5; do
        for rule in forward_forward mono_forward backprop; do
            options=
            [ $rule = forward_forward ] && options='rule-options="loss=symba alpha=0.1 label_scale=5"'
            name=$rule-alpha$alpha-seed$seed
            grep -qs "\"name\":\"$name\"" results.jsonl && continue # a run that is finished is kept
            file=$scratch/$name.json
            runs+=("data=\"mnist\" train-samples=10000 precision=\"bf16\" rounds=4 local-epochs=2 rule=\"$rule\" $options \
alpha=$alpha seed=$seed out=\"$file\"")
        done
    done
done
[ ${#runs[@]} -eq 0 ] || CLIENTS=10 bash ../../examples/federated/run.sh "${runs[@]}"
for file in "$scratch"/*.json; do
    [ -e "$file" ] || continue
    python ../evidence.py keep . "$(basename "$file" .json)" "$file" --packages flwr ray \
        --command "bash benchmarks/federated-local-losses/run.sh"
done
python ../run.py . --table
