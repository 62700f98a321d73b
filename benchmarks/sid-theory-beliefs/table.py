"""Beliefs of SID's cascade, module by module, and early exit."""

from evidence import spread, table, wrapped

COLUMNS = {  # of the table: field, factor, digits
    "accuracy, %": ("accuracy", 100, 2),
    "divergence from the label, nats": ("label_kl", 1, 3),
    "telescoped bound, nats": ("bound", 1, 3),
    "within the bound, %": ("within_bound", 100, 1),
    "descent, %": ("descent", 100, 1),
    "consistency, nats": ("consistency", 1, 4),
    "entropy, nats": ("entropy", 1, 3),
}


def cell(lines, module, field, factor, digits):
    """Mean and standard deviation over the seeds; empty where a module has no such figure."""
    rows = [line["modules"][module] for line in lines]
    return spread([row[field] for row in rows if field in row], factor, digits)


def figures(lines):
    last = len(lines[0]["modules"]) - 1
    return {
        "kl_first": cell(lines, 1, "label_kl", 1, 3),
        "kl_last": cell(lines, last, "label_kl", 1, 3),
        "accuracy_first": cell(lines, 1, "accuracy", 100, 1),
        "accuracy_last": cell(lines, last, "accuracy", 100, 1),
        "within": cell(lines, last, "within_bound", 100, 1),
        "bound": cell(lines, last, "bound", 1, 2),
    }


def by_module(lines, modules, columns):
    body = [[str(module), *(cell(lines, module, *COLUMNS[name]) for name in columns)] for module in modules]
    return table(["module", *columns], body)


def small(lines):
    last = len(lines[0]["modules"]) - 1
    columns = ["accuracy, %", "divergence from the label, nats", "telescoped bound, nats", "descent, %"]
    return by_module(lines, [0, 1, last // 2, last], columns)


def tables(lines):
    text = wrapped(
        "Fashion-MNIST, ten modules at half the authors' width, 1,000 steps, alpha 0.5, learning rate 1e-2 (not tuned "
        f"here); the 10,000 test images, mean ± standard deviation over {len(lines)} seeds. Module 0 is the uniform "
        "belief. Descent is the share of samples whose loss at a module is no larger than that of the belief before. "
        "Where that holds at all modules so far, the telescoped bound follows."
    )
    text += ["", *by_module(lines, range(len(lines[0]["modules"])), list(COLUMNS)), "", "## Early exit", ""]
    body = []
    for exits in zip(*(line["early_exit"] for line in lines), strict=True):
        accuracy, used = ([row[field] for row in exits] for field in ("accuracy", "modules_used"))
        body.append([f"{exits[0]['threshold']:g}", spread(accuracy, 100, 2), spread(used, 1, 2)])
    return [*text, *table(["stop at probability", "accuracy, %", "modules used"], body)]
