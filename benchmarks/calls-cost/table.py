"""Processor time of a step, against a loop that is written by hand."""

from evidence import table, wrapped

KINDS = {"calls": "cut at calls", "functions": "cut into functions"}


def figures(lines):
    (line,) = lines
    ends = {}
    for kind, prefix in (("calls", ""), ("functions", "functions_")):
        medians = [row[kind][0] for row in line["rows"]]
        ends |= {f"{prefix}low": f"{min(medians):.3f}", f"{prefix}high": f"{max(medians):.3f}"}
    return ends


def small(lines):
    (line,) = lines
    body = []
    for row in line["rows"]:
        ratios = ["{:.3f} ({:.3f} .. {:.3f})".format(row[kind][0], *row[f"{kind}_median"]) for kind in KINDS]
        extra = [f"{1000 * row[f'{kind}_extra']:.1f}" for kind in KINDS]
        body.append([str(row["width"]), f"{1000 * row['seconds']:.0f}", *ratios, *extra])
    head = ["width", "by hand, ms", *KINDS.values(), *(f"{kind}, ms more" for kind in KINDS.values())]
    return table(head, body)


def tables(lines):
    (line,) = lines
    text = wrapped(
        "`local_ce` on 12 `nn.TransformerEncoderLayer`s with a batch of 32 sequences of 32, AdamW, one thread. "
        "The three contenders take steps in turn, and each ratio is one within a round: the median, with its "
        "interval of 95 %. Freed memory stays with the process (`keep_freed_memory`), for all three. "
        "The loop by hand checks nothing and reports nothing; the learner checks every gradient for numbers "
        "that are not finite, and gives loss and accuracy of every block. After the last round the "
        f"three hold the same weights, up to a relative {max(row['apart'] for row in line['rows']):.0e}."
    )
    return [*text, "", *small(lines)]
