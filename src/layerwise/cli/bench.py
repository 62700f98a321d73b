"""`layerwise bench memory|speed|scaling`."""

from collections.abc import Sequence

from layerwise.cli.early import check_names, check_options, values
from layerwise.cli.flags import check_flags
from layerwise.errors import LayerwiseError, suggestion

KINDS = ("memory", "speed", "scaling")


def bench_command(argv: list[str]) -> int:
    """`layerwise bench KIND`: measure memory by depth, time per step, or throughput of several processes."""
    if not argv or argv[0] not in KINDS:
        near = (
            f"there is no benchmark {argv[0]!r}; {suggestion(argv[0], KINDS)}" if argv else f"one of {', '.join(KINDS)}"
        )
        raise LayerwiseError(f"say what to measure: {near}; layerwise bench KIND --help lists the options.")
    kind, *rest = argv
    rest = model_options(rest)
    check_flags(f"bench {kind}", rest)
    if kind == "memory":
        check_names("rule", (word.partition(":")[0] for word in values(rest, "rule")))
        check_names("model", values(rest, "model"))
        from layerwise.measure.bench_memory import memory_command

        return memory_command(rest)
    check_options(rest, "model")
    if kind == "speed":
        check_names("rule", (word.partition(":")[0] for word in values(rest, "rule")))
        from layerwise.measure.bench_speed import speed_command

        return speed_command(rest)
    check_options(rest, "rule")
    from layerwise.scaling.bench import scaling_command

    return scaling_command(rest)


def model_options(words: Sequence[str]) -> list[str]:
    """Rewrite `--model.NAME VALUE` as pairs of one option, because each model has options of its own.

    >>> model_options(["--model", "mlp", "--model.width", "64", "--depths", "4", "--model.heads=2"])
    ['--model', 'mlp', '--depths', '4', '--model-options', 'width', '64', 'heads', '2']
    """
    kept, pairs, rest = [], [], iter(words)
    for word in rest:
        if not word.startswith("--model."):
            kept.append(word)
            continue
        name, given, value = word.removeprefix("--model.").partition("=")
        if not given and (value := next(rest, None)) is None:
            raise LayerwiseError(f"{word} needs a value; see layerwise ls models.")
        pairs += [name.replace("-", "_"), str(value)]
    return [*kept, "--model-options", *pairs] if pairs else kept
