#!/usr/bin/env bash
# Processor time of a step of a model that is cut at its calls, against a loop by hand; ten minutes on an idle core.
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/calls-cost/measure.py "$@"
