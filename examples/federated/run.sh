#!/usr/bin/env bash
# Runs of the example, one after the other, on a SuperLink of their own that ends with them.
#   CLIENTS=10 bash examples/federated/run.sh 'rule="mono_forward" alpha=0.5' [CONFIGURATION ...]
set -euo pipefail
app=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# Nothing is kept in the home folder, nothing is reported about the run, and nothing is installed for it.
export FLWR_HOME=$work FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
printf '[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:%s"\ninsecure = true\n' "$port" > "$work/config.toml"
flower-superlink --insecure --simulation --disable-runtime-dependency-installation --host 127.0.0.1 --port "$port" \
    > "$work/superlink.log" 2>&1 &
superlink=$!
trap 'kill "$superlink" 2> /dev/null || true; wait "$superlink" 2> /dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 120); do
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health')" 2> /dev/null && break
    kill -0 "$superlink" 2> /dev/null || break
    sleep 0.5
done
kill -0 "$superlink" 2> /dev/null || { tail -n 20 "$work/superlink.log" >&2; exit 1; }
for config in "${@:-}"; do
    config="clients=${CLIENTS:-10} $config"
    echo "== $config"
    flwr run "$app" --stream --federation-config "num-supernodes=${CLIENTS:-10}" --run-config "$config" | tee "$work/log"
    grep -q '^round ' "$work/log" || { echo "the run has failed: $config" >&2; exit 1; }
done
