"""Throughput on several processes, measured and simulated."""

from evidence import table, wrapped


def all_ways(lines):
    return next(line for line in lines if line["name"] == "all_ways")


def measured(lines):
    return [row for row in all_ways(lines)["rows"] if "samples_per_second" in row]


def simulated(lines):
    return [row for row in all_ways(lines)["rows"] if "speedup" in row]


def figures(lines):
    found = {f"{row['way']}_{row['ranks']}": f"{row['ratio']:.2f}" for row in measured(lines)}
    found |= {f"{row['way']}_{row['ranks']}_hosts": f"{row['speedup']:.0f}" for row in simulated(lines)}
    off = [
        (row["way"], abs(row["predicted"] / row["samples_per_second"] - 1))
        for row in measured(lines)
        if row["predicted"]
    ]
    found["off"] = f"{100 * max(error for way, error in off if way == 'pipeline'):.0f}"
    found["off_torch"] = f"{100 * max(error for way, error in off if way != 'pipeline'):.0f}"
    return found


def small(lines):
    body = [
        [
            row["way"],
            f"`{row['rule']}`",
            f"{row['samples_per_second']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_10']:.2f} .. {row['ratio_90']:.2f})",
            f"{max(row['bytes_per_step']) / 2**20:.1f}",
        ]
        for row in measured(lines)
        if row["ranks"] == 2
    ]
    return table(["way, two ranks", "rule", "samples/s", "÷ one process", "MiB per step"], body)


def full(rows):
    head = [
        *("way", "rule", "ranks", "samples/s", "ratio to rule", "MiB sent per step, by rank", "waiting, % by rank"),
        *("fill, s", "simulated"),
    ]
    body = []
    for row in rows:
        predicted = row["predicted"]
        off = "" if predicted is None else f"{100 * (predicted / row['samples_per_second'] - 1):+.0f} %"
        body.append(
            [
                row["way"],
                f"`{row['rule']}`",
                str(row["ranks"]),
                f"{row['samples_per_second']:.1f} ({row['samples_per_second_10']:.1f} .. "
                f"{row['samples_per_second_90']:.1f})",
                f"{row['ratio']:.2f} ({row['ratio_10']:.2f} .. {row['ratio_90']:.2f})",
                " ".join(f"{size / 2**20:.1f}" for size in row["bytes_per_step"]),
                " ".join(f"{100 * share:.0f}" for share in row["waiting"]),
                f"{row['fill']:.2f}",
                "" if predicted is None else f"{predicted:.1f} ({off})",
            ]
        )
    return table(head, body)


def tables(lines):
    first = measured(lines)[0]
    hosts = simulated(lines)
    text = wrapped(
        f"{first['model']} of {first['depth']} blocks, batch {first['batch_size']}, threads per rank: "
        f"{first['threads']}; median of {first['rounds']} interleaved rounds of {first['steps']} steps (10 % .. 90 %). "
        "Throughput is that of the steady state. *Fill* is the time until the last rank has its first batch done, "
        "which torch's pipelines pay in every step and ours once. *Simulated* is what the simulator makes of the "
        "blocks' times in one process."
    )
    for line in lines:
        text += ["", f"`{line['name']}`: `{line['command']}`", ""]
        text += full([row for row in line["rows"] if "samples_per_second" in row])
    if not hosts:
        return text
    ways = list(dict.fromkeys(row["way"] for row in hosts))
    body = []
    for ranks in dict.fromkeys(row["ranks"] for row in hosts):
        here = {row["way"]: row for row in hosts if row["ranks"] == ranks}
        cells = [f"{here[w]['predicted']:.1f} ({here[w]['speedup']:.1f})" if w in here else "" for w in ways]
        body.append([str(ranks), str(next(iter(here.values()))["depth"]), *cells])
    text += ["", "## Simulated", ""]
    text += wrapped(
        f"One rank per host, {hosts[0]['latency_ms']:g} ms and {hosts[0]['gbit_per_second'] or 'any'} Gbit/s "
        "between two neighbours, a network that grows with the ranks: samples/s, and in brackets how many times one "
        "process with the same rule. There are as many micro-batches as ranks, at least those measured."
    )
    return [*text, "", *table(["ranks", "blocks", *ways], body)]
