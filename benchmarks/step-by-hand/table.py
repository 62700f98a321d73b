"""Processor time of a step, against loops that are written by hand."""

from evidence import table, wrapped


def figures(lines):
    (line,) = lines
    ends = {}
    for kind in ("mlp", "tiny", "cascade"):
        ratios = [row["ratio"][0] for row in line["rows"] if row["case"].startswith(kind)]
        ends[kind] = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))
    return ends


def small(lines):
    (line,) = lines
    body = [
        [
            row["case"],
            str(row["groups"]),
            f"{1000 * row['seconds']:.1f}",
            "{:.3f} ({:.3f} .. {:.3f})".format(*row["ratio"]),
            f"{1000 * row['extra'] / row['groups']:.2f}",
        ]
        for row in line["rows"]
    ]
    return table(["case", "groups", "by hand, ms", "ratio", "more per group, ms"], body)


def tables(lines):
    text = wrapped(
        "One thread, AdamW, float32. *mlp* is 3 x 1000 with a batch of 128, *tiny* has 12 blocks of width 8 and a "
        "batch of 32, *cascade* has so many modules on images of that size and a batch of 128. The two take steps in "
        "turn, in an order that changes from round to round, and each ratio is one within a round: the median, with "
        "the range that holds eight of ten rounds. The loop by hand checks nothing and reports nothing; the learner "
        "checks every gradient for numbers that are not finite, and gives loss and accuracy of every block. Before "
        "they are timed, the two hold the same weights after three steps: to the bit on the MLPs, to 1e-9 in float64 "
        "on the cascade, whose gradients on the features are added up in another order. The cascade by hand runs the "
        "extractor once and every module twice, as its authors do."
    )
    return [*text, "", *small(lines)]
