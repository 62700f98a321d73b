"""From a model and what was said of its cuts to a partition, and whether a rule can serve it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.calls import CallPartition, Output, Read, Tied, cut_at_calls
from layerwise.core.chains import is_sequential
from layerwise.core.contract import groups_of
from layerwise.core.cutting import partition
from layerwise.core.pieces import has_trunk
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError


def cut(
    model: nn.Module,
    cuts: Sequence[str] | str | None,
    blocks: int | None,
    output: Output,
    read: Read,
    tied: Tied | None,
    example: Any,
    layout: Mapping[str, str] | str | None,
) -> Partition:
    """Cut the model at its calls where something asks for that, into functions otherwise."""
    named = [cuts] if isinstance(cuts, str) else list(cuts or [])
    asked = cuts == "auto" or any(letter in name for name in named for letter in "*?[")
    asked = asked or output is not None or read is not None or tied is not None
    asked = asked or not (example is None or isinstance(example, Tensor))
    if isinstance(model, Partition):
        if asked and (cuts is not None or output is not None or read is not None or tied is not None):
            raise LayerwiseError("the model is cut already; give cuts, output, read and tied where it is cut.")
        return partition(model, layout=layout)
    if asked:
        names = "auto" if cuts is None else cuts
        return cut_at_calls(model, names, output=output, read=read, tied=tied or "last", blocks=blocks, layout=layout)
    try:
        return partition(model, cuts, blocks=blocks, example=example, layout=layout)
    except LayerwiseError as reason:
        modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        if not named or not all(name in modules for name in named) or is_sequential(model):
            raise
        raise LayerwiseError(
            f"{str(reason).removesuffix('.')}; or let it run its own forward pass: cut_at_calls(model, {named})."
        ) from reason


def check_serves(network: CallPartition, rule: Rule, **options: Any) -> None:
    """Raise LayerwiseError where the rule or an option needs blocks that can be run on their own.

    Args:
        network: what is trained.
        rule: the rule.
        options: `offload`, `stage`, `replicas`, `compile`, `micro` of the learner.
    """
    network.__dict__["asked_by"] = rule.name
    alone = "and the blocks of a model that is cut at its calls run once per step, inside one forward pass"
    other = "choose a rule such as local_ce, or give a model that partition() can trace"
    ranges = groups_of(rule, [*network.cuts, "head"])
    if any(view.stop > later.start for view, later in pairwise(ranges)):
        raise LayerwiseError(f"rule {rule.name!r} runs blocks in two groups under these options, {alone}; {other}.")
    if has_trunk(rule):
        raise LayerwiseError(f"rule {rule.name!r} trains a trunk that waits for later blocks, {alone}; {other}.")
    if not rule.runs_once:
        raise LayerwiseError(f"rule {rule.name!r} runs a block more than once, {alone}; {other}.")
    if rule.models:
        raise LayerwiseError(f"rule {rule.name!r} trains the models {', '.join(rule.models)} alone; {other}.")
    reasons = {
        "offload": ("offload", options["offload"] != "none"),
        "stage": ("a stage", options["stage"] is not None),
        "replicas": ("sharding", getattr(options["replicas"], "shares_parameters", False)),
        "compile": ("compile", bool(options["compile"])),
        "micro": ("micro", options["micro"] > 1),
    }
    for what, given in reasons.values():
        if given:
            raise LayerwiseError(
                f"{what} needs blocks that can be run on their own, {alone}; leave it out, or give a model that "
                "partition() can trace."
            )


def check_reads(rule: Rule, x: Any) -> None:
    """Raise LayerwiseError where the rule looks at the network's input, which is no single tensor."""
    if not isinstance(x, Tensor) and (rule.reads_input or type(rule).begin is not Rule.begin):
        raise LayerwiseError(
            f"rule {rule.name!r} looks at the input itself, which has to be one tensor, and this batch is a "
            f"{type(x).__name__}; choose a rule such as local_ce."
        )


def labelled(x: Any, y: Tensor | None) -> tuple[Any, Any]:
    """A batch and its labels: as given, or the entry `labels` of a mapping, which the model does not get then."""
    if y is None and isinstance(x, Mapping) and "labels" in x:
        x = dict(x)
        y = x.pop("labels")
    return x, y
