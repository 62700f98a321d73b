"""Benchmarks on the report page: memory, speed and scaling."""

from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.files import shown
from layerwise.records import convert
from layerwise.report import figures
from layerwise.report.reading import (
    ADVICE,
    BENCHES,
    Bench,
    MeasuredRow,
    MemoryRow,
    ScalingRow,
    read_record,
)
from layerwise.report.sections import Origin, Section
from layerwise.runs.environment import machine_in_words


def read_bench(folder: Path, name: str) -> dict[str, Any] | None:
    """A benchmark's JSON file: `{"command", "environment", "rows"}`, or the rows alone; None for any other file.

    Raises:
        LayerwiseError: a row of a benchmark lacks a field, or a field has another type.
    """
    file = folder / name
    try:
        found: Any = read_record(folder, name, object)
    except LayerwiseError:
        return None  # not a file of ours
    if isinstance(found, list):
        found = {"command": f"layerwise bench, file {file.name}", "environment": None, "rows": found}
    rows = found.get("rows") if isinstance(found, dict) else None
    if (
        not isinstance(rows, list)
        or not rows
        or not isinstance(rows[0], dict)
        or not {"rule", "model"} <= rows[0].keys()
    ):
        return None
    kind = next((kind for field, kind in BENCHES.items() if field in rows[0]), None)
    if kind is None:
        return None
    bench: Any = convert(found | {"rows": []}, Bench, shown(file), ADVICE)
    typed: list[Any] = convert(rows, list[kind], f"'rows' of {shown(file)}", ADVICE)
    if kind is ScalingRow:  # a row that was only simulated is not drawn
        measured = [row for row in typed if "samples_per_second" in row]
        typed = convert(measured, list[MeasuredRow], f"'rows' of {shown(file)}", ADVICE)
    return dict(bench) | {"rows": typed, "name": file.stem, "kind": kind}


def put_bench(found: dict[str, Any], page: dict[str, Any]) -> None:
    """Put a benchmark of memory, speed or scaling on the page."""
    rows, machine = found["rows"], found["environment"]
    origin = Origin(
        found["command"], machine_in_words(machine) if machine else "The file does not say on which machine."
    )
    page["origins"].append(origin)
    looks = figures.look(list(dict.fromkeys(row["rule"] for row in rows)))
    if found["kind"] is MemoryRow:
        page["sections"].append(_depths(found["name"], rows, looks, origin))
    elif found["kind"] is ScalingRow:
        page["sections"].append(_scaling(found["name"], rows, origin))
    else:
        page["sections"].append(_speeds(found["name"], rows, origin))


def _depths(name: str, rows: list[dict[str, Any]], looks: Any, origin: Origin) -> Section:
    section = Section("Memory against depth", "One training step; exact bytes on the CPU, the allocator's on CUDA.")
    kinds: list[tuple[str, str, tuple[str, ...], str]] = [
        ("", "Activations + gradients", ("activations", "gradients"), "at the peak of a step")
    ]
    if all(row.get("resident") for row in rows):
        kinds.append(
            (
                "_resident",
                "Resident memory",
                ("resident",),
                f"of a process, blocks on {rows[0].get('offload', 'the device')}",
            )
        )
    for model in dict.fromkeys(row["model"] for row in rows):
        for suffix, title, parts, where in kinds:
            points: dict[str, list[tuple[float, float, None]]] = {}
            for row in sorted((row for row in rows if row["model"] == model), key=lambda row: row["depth"]):
                held = sum(row[part] for part in parts) / 2**20
                points.setdefault(row["rule"], []).append((float(row["depth"]), held, None))
            ends = "; ".join(f"{rule} {p[0][1]:.3g} to {p[-1][1]:.3g} MiB" for rule, p in points.items())
            section.draw(
                f"{name}_{model}{suffix}",
                f"{title}, {model}",
                f"{title} of one step of {model} against the number of blocks, from the least to the most: {ends}.",
                lambda axes, points=points: figures.curves(axes, points, "number of blocks", "MiB", looks, log=True),
                figures.height(len(points)),
                f"{title} {where}, against the number of blocks.",
                origin,
            )
    return section


def _speeds(name: str, rows: list[dict[str, Any]], origin: Origin) -> Section:
    section = Section("Time per step", "Rules interleaved in one process; medians.")
    parts = {
        row["rule"]: {p: 1000 * row["seconds"] * s for p, s in (row.get("shares") or {"step": 1.0}).items()}
        for row in rows
    }
    values = "; ".join(
        f"{row['rule']} {1000 * row['seconds']:.3g} ms, {row['ratio']:.2f} times {row['baseline']}" for row in rows
    )
    alt = f"Milliseconds per training step. {values}."
    _draw_times(
        section, name, rows[0], "step", alt, parts, f"Median over {rows[0]['rounds']} rounds. {values}.", origin
    )
    return section


def _draw_times(
    section: Section,
    name: str,
    row: dict[str, Any],
    per: str,
    alt: str,
    parts: dict[str, dict[str, float]],
    caption: str,
    origin: Origin,
) -> None:
    """Draw bars of milliseconds per step or batch, one per entry of `parts`, divided into its shares."""
    title = f"Time per {per}, {row['model']} of {row['depth']} blocks"
    height = 1.4 + 0.35 * len(parts)
    section.draw(
        f"{name}_time", title, alt, lambda axes: figures.shares(axes, parts, f"ms per {per}"), height, caption, origin
    )


def _scaling(name: str, rows: list[dict[str, Any]], origin: Origin) -> Section:
    section = Section("Throughput on several processes", "Ways interleaved; medians; one batch per step.")
    if not rows:
        return section
    parts = {}
    for row in rows:
        shares = {part: sum(row[part]) / row["ranks"] for part in ("busy", "queued", "waiting")}
        parts[f"{row['way']}, {row['ranks']}"] = {p: 1000 * row["seconds"] * share for p, share in shares.items()}
    values = "; ".join(
        f"{row['way']} on {row['ranks']}: {row['samples_per_second']:.1f} samples/s, {row['ratio']:.2f} times rule"
        for row in rows
    )
    alt = f"Milliseconds per batch by way and number of processes: computing, queued for a core, waiting. {values}."
    caption = f"Median over {rows[0]['rounds']} rounds, mean over the processes. {values}."
    _draw_times(section, name, rows[0], "batch", alt, parts, caption, origin)
    return section
