"""`layerwise bench memory|speed|scaling`."""

from layerwise.cli.early import check_names, check_options, values
from layerwise.errors import LayerwiseError, suggestion

KINDS = ("memory", "speed", "scaling")


def bench_command(argv: list[str]) -> int:
    """`layerwise bench KIND`: measure memory by depth, time per step, or throughput of several processes."""
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: layerwise bench memory|speed|scaling [OPTIONS]\n\n`layerwise bench KIND --help` lists the options."
        )
        return 0
    if not argv or argv[0] not in KINDS:
        near = f"{argv[0]!r} is no benchmark; {suggestion(argv[0], KINDS)}" if argv else f"one of {', '.join(KINDS)}"
        raise LayerwiseError(f"say what to measure: {near}; layerwise bench KIND --help lists the options.")
    kind, *rest = argv
    if kind == "memory":
        check_names("rule", (word.partition(":")[0] for word in values(rest, "rule")))
        check_names("model", values(rest, "model"))
        from layerwise.measure.bench_memory import memory_command

        return memory_command(rest)
    check_options(rest, "model")
    if kind == "speed":
        check_names("rule", (word.partition(":")[0] for word in values(rest, "rules")))
        from layerwise.measure.bench_speed import speed_command

        return speed_command(rest)
    check_options(rest, "rule")
    from layerwise.scaling.bench import scaling_command

    return scaling_command(rest)
