#!/usr/bin/env bash
# Suites for one GPU, without a network, each under ten minutes, in the order of what is worth most.
#
#   LAYERWISE_DATA=DIR bash benchmarks/gpu.sh [--stage tests|table|language|resnet] [--device cuda] [--out benchmarks/gpu]
#
# tests     the bits, the mathematics and flat memory of every rule on CUDA, offloading, no waiting: tests/cuda, and the
#           tests of rules, learners and memory on nets that lie on the GPU
# table     CIFAR-10 accuracy, memory and time of a ViT by depth, in one table (the default)
# language  the grid `characters` of language-models; repeat the command to continue it
# resnet    ResNet-32 in 2, 4, 8 and 15 groups: dgl, heads that look ahead, windows with losses of their own, backprop
#
# DIR holds CIFAR-10 and tinyshakespeare as the library reads them; `python benchmarks/parts.py` cuts them into files of
# at most 40 MiB, to be carried one by one. Every run of the table trains for the same number of seconds, so its length
# does not depend on the GPU. `--device cpu` is a tiny form of the table on the embedded digits that shows that it
# works, not how fast anything is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
device=cuda out=$here/gpu stage=table
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 ;;
    --out) out=$2 ;;
    --stage) stage=$2 ;;
    *) echo "gpu.sh: unknown option $1; it takes --stage, --device and --out." >&2 && exit 2 ;;
    esac
    shift 2
done
case $stage in
table) ;;
tests)
    cd "$here/.."
    export LAYERWISE_TEST_DEVICE=$device CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1
    python -m pytest -q --tb=short tests/cuda
    exec python -m pytest -q --tb=short tests/rules tests/learner tests/memory tests/core/test_engine.py
    ;;
language) exec python "$here/run.py" "$here/language-models" --grid characters --device "$device" --jobs 12 ;;
resnet)
    rules=()
    for rate in 0.1 0.3 0.9; do
        rules+=("backprop:lr=$rate")
        for group in 8 4 2 1; do
            for further in "" :ahead=momentum :ahead=both ":overlap=$group:own=true"; do
                rules+=("dgl:group=$group$further:lr=$rate")
            done
        done
    done
    exec layerwise compare --rule "${rules[@]}" --data cifar10 --model resnet --model.depth 15 --model.width 16 \
        --batch-size 512 --optimizer sgd --weight-decay 5e-4 --precision bf16 --channels-last --augment flip crop \
        --epochs 10 --seeds 1 --jobs 12 --threads 1 --no-report --device "$device" --out "$out/resnet"
    ;;
*) echo "gpu.sh: unknown stage $stage; it has tests, table, language and resnet." >&2 && exit 2 ;;
esac

if [ "$device" = cpu ]; then
    grid=(--rule sll backprop --seeds 1 --steps 4 --model.width 16 --batch-size 256 --jobs 1)
    memory=(--rule sll backprop --model mlp --depths 2,4 --shape 1 8 8 --batch-size 4 --model.width 16)
    speed=(--rule sll backprop --model mlp --depth 2 --rounds 2 --shape 1 8 8 --batch-size 4 --model.width 16)
else
    grid=(--rule sll:pool=moments:overlap=1 local_ce:pool=moments backprop backprop_checkpoint
        --data cifar10 --model vgg --batch-size 256 --precision bf16 --channels-last --augment flip crop
        --seeds 3 --seconds 15 --lr 4e-3)
    memory=(--model vit --depths 4,16,64 --batch-size 128 --precision bf16)
    speed=(--rule sll local_ce backprop backprop_checkpoint --model vit --depth 12 --batch-size 256 --rounds 20
        --precision bf16)
fi

layerwise compare "${grid[@]}" --device "$device" --out "$out"
layerwise bench memory "${memory[@]}" --device "$device" --out "$out"
layerwise bench speed "${speed[@]}" --device "$device" --out "$out"
python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

from layerwise.runs.environment import machine_in_words
from layerwise.report.summary import columns, table_rows

out = Path(sys.argv[1])
rules = json.loads((out / "summary.json").read_text())["rules"]
memory, speed = (json.loads((out / f"{name}.json").read_text())["rows"] for name in ("memory", "speed"))
lines = [machine_in_words(json.loads((out / "environment.json").read_text())), ""]


def write(names, rows):
    lines.extend(["| " + " | ".join(names) + " |", "|---" * len(names) + "|"])
    lines.extend("| " + " | ".join(map(str, row)) + " |" for row in rows)


depths = sorted({row["depth"] for row in memory})
held = {(row["rule"], row["depth"]): (row["activations"] + row["gradients"]) / 2**20 for row in memory}
ratios = {row["rule"]: f"{row['ratio']:.2f} ({row['ratio_10']:.2f} .. {row['ratio_90']:.2f})" for row in speed}
more = [f"act. + grad. of {memory[0]['model']}, {depth} blocks, MiB" for depth in depths]
more.append(f"time per step of {speed[0]['model']}, {speed[0]['depth']} blocks, / {speed[0]['baseline']}")
compared = {label.partition(":")[0]: row for label, row in zip(rules, table_rows(rules))}
rows = []
for rule in dict.fromkeys([*compared, *(row["rule"] for row in memory)]):
    first = compared.get(rule, (rule, *[""] * (len(columns()) - 1)))
    rows.append([*first, *(f"{held[rule, d]:.1f}" if (rule, d) in held else "" for d in depths), ratios.get(rule, "")])
write([*columns(), *more], rows)
(out / "table.md").write_text("# One GPU, ten minutes\n\n" + "\n".join(lines) + "\n")
print("\n".join(lines))
PYTHON
