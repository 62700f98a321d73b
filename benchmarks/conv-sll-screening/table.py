"""Single runs on the validation split that led to the options of `sll`."""

from evidence import table, wrapped

SHOWN = ("rule.", "rule ", "lr ", "batch-size ")


def rows(lines):
    body = []
    for run in lines:
        words = " ".join(run["command"].split()[2:]).split("--")
        options = ", ".join(word.strip() for word in words if word.startswith(SHOWN))
        blocks = " ".join(f"{100 * value:.1f}" for value in run["blocks"].values())
        body.append([run["name"], options, f"{run['epochs']:g}", f"{100 * run['val_accuracy']:.1f}", blocks])
    return body


HEAD = ["run", "options", "epochs", "val, %", "by block, head last"]


def figures(lines):
    return {row[0]: row[3] for row in rows(lines)}


def small(lines):
    shown = ("04", "05", "07", "08", "10", "21")
    return table(HEAD, [row for row in rows(lines) if row[0][:2] in shown])


def tables(lines):
    text = wrapped(
        "CIFAR-10, four convolutions 64-128-256-256, bf16, flip and crop, seed 0; accuracy on the validation split."
    )
    return [*text, "", *table(HEAD, rows(lines))]
