#!/usr/bin/env bash
# A suite that fits ten minutes on one GPU, without a network; prints one table.
#
#   LAYERWISE_DATA=DIR bash benchmarks/gpu.sh [--device cuda] [--out benchmarks/gpu]
#
# DIR holds CIFAR-10 as the library reads it. Every run trains for the same number of seconds, so the length of the
# suite does not depend on the GPU. `--device cpu` is a tiny form on the embedded digits that shows that the suite
# works, not how fast anything is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
device=cuda out=$here/gpu
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 ;;
    --out) out=$2 ;;
    *) echo "gpu.sh: unknown option $1; it takes --device and --out." >&2 && exit 2 ;;
    esac
    shift 2
done

if [ "$device" = cpu ]; then
    grid=(--rules sll backprop --seeds 1 --steps 4 --model.width 16 --batch-size 256 --jobs 1)
    memory=(--rule sll backprop --model mlp --depths 2,4 --shape 1 8 8 --batch-size 4 --model-options width 16)
    speed=(--rules sll backprop --model mlp --depth 2 --rounds 2 --shape 1 8 8 --batch-size 4 --model-options width 16)
else
    grid=(--rules sll:pool=moments:overlap=1 local_ce:pool=moments backprop backprop_checkpoint
        --data cifar10 --model vgg --batch-size 256 --precision bf16 --channels-last --augment flip crop
        --seeds 3 --seconds 15 --lr 4e-3)
    memory=(--model vit --depths 4,16,64 --batch-size 128 --precision bf16)
    speed=(--rules sll local_ce backprop backprop_checkpoint --model vit --depth 12 --batch-size 256 --rounds 20
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
