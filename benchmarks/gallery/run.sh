#!/usr/bin/env bash
# The gallery; a quarter of an hour on one core. It needs transformers, timm, torchvision, peft and torch-geometric; rows
# of a library that is missing stay as they are. Beside a torch for the CPU install them without their torch:
#   pip install --no-deps transformers tokenizers regex huggingface_hub timm torchvision peft accelerate torch-geometric
set -euo pipefail
cd "$(dirname "$0")/../.."
HF_HUB_OFFLINE=1 python benchmarks/gallery/measure.py "$@"
