#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces with a slow wire between them, by root on Linux. Our pipeline of two
# ranks beside torch's Schedule1F1B and ScheduleGPipe at several delays and bandwidths.
#   sudo bash benchmarks/pipeline-slow-wire/run.sh [options of `layerwise bench scaling`]
#   WIRES="0:1000 50:1000" ROUNDS=1: other wires (milliseconds one way : Mbit/s) and rounds.
set -euo pipefail
cd "$(dirname "$0")"
WIRES=${WIRES:-"0:1000 10:1000 25:1000 50:1000 100:1000 50:200"}
ROUNDS=${ROUNDS:-3}
here=$PWD
OUT=${OUT:-$here}
OPTIONS=("$@")
if [ ${#OPTIONS[@]} -eq 0 ]; then
    OPTIONS=(--model vit --depth 12 --batch-size 64 --micro-batches 4 --steps 4 --warmup 1)
fi

scratch=$(mktemp -d)
one=lw-one-$$ two=lw-two-$$ wire=lw-wire-$$ link=
stop_link() {
    if [ -n "$link" ]; then
        kill "$link" 2>/dev/null || true
        wait "$link" 2>/dev/null || true
        link=
    fi
}
down() {
    stop_link
    rm -rf "$scratch"
    for space in "$one" "$two" "$wire"; do
        ip netns del "$space" 2>/dev/null || true
    done
}
trap down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for space in "$one" "$two" "$wire"; do
    ip netns add "$space"
    ip netns exec "$space" sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 || true
    ip -n "$space" link set lo up
done
# 10.77.0.1 - [the wire's namespace] - 10.77.0.2
ip link add eth0 netns "$one" type veth peer name one netns "$wire"
ip link add eth0 netns "$two" type veth peer name two netns "$wire"
ip -n "$one" address add 10.77.0.1/24 dev eth0
ip -n "$two" address add 10.77.0.2/24 dev eth0
ip -n "$one" link set eth0 up
ip -n "$two" link set eth0 up
ip -n "$wire" link set one up
ip -n "$wire" link set two up

mkdir -p "$OUT"
for ((round = 1; round <= ROUNDS; round++)); do
    for way in $WIRES; do
        delay=${way%:*} rate=${way#*:}
        stop_link
        coproc LINK { exec ip netns exec "$wire" python link.py one two --delay "$delay" --rate "$rate"; }
        link=$LINK_PID
        read -r -t 20 -u "${LINK[0]}" _  # it carries
        echo "round $round of $ROUNDS: $delay ms one way, $rate Mbit/s" >&2
        ip netns exec "$one" python -c "$(cat <<'PING'
import socket, subprocess, sys, time
echo = "import socket; s = socket.create_server(('10.77.0.2', 7777)); print(flush=True); c, _ = s.accept(); c.sendall(c.recv(1))"
peer = subprocess.Popen(["ip", "netns", "exec", sys.argv[1], sys.executable, "-c", echo], stdout=subprocess.PIPE)
peer.stdout.readline()
line = socket.create_connection(("10.77.0.2", 7777), timeout=20)
start = time.perf_counter(); line.sendall(b"x"); line.recv(1)
print(f"  round trip: {1000 * (time.perf_counter() - start):.1f} ms", file=sys.stderr)
peer.wait(20)
PING
)" "$two"
        timeout 1200 python -m layerwise bench scaling --ways rule pipeline 1f1b gpipe --ranks 2 --rounds 1 --timeout 120 \
            --hosts "ip netns exec $one env GLOO_SOCKET_IFNAME=eth0 TP_SOCKET_IFNAME=eth0" \
            "ip netns exec $two env GLOO_SOCKET_IFNAME=eth0 TP_SOCKET_IFNAME=eth0" \
            --address 10.77.0.1 --latency "$delay" --bandwidth "$(python -c "print($rate / 1000)")" \
            --json "$scratch/run.json" "${OPTIONS[@]}" >&2
        python "$here/../evidence.py" keep "$OUT" "delay$delay-rate$rate-round$round" "$scratch/run.json" --command \
            "layerwise bench scaling --ways rule pipeline 1f1b gpipe --ranks 2 --rounds 1 --hosts ... ${OPTIONS[*]}"
    done
done
[ "$OUT" != "$here" ] || python "$here/../run.py" "$here" --table
