"""Makes a partition from a model and its cuts, and checks whether a rule can train it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.calls import CallPartition
from layerwise.core.chains import is_sequential
from layerwise.core.contract import groups_of
from layerwise.core.cut_names import has_patterns
from layerwise.core.cutting import cut_at_calls, materialise, partition
from layerwise.core.ownership import Tied
from layerwise.core.pieces import has_trunk
from layerwise.core.reading import Output, Read
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
    """Cut the model at its calls if an argument requires that, or nothing says where; otherwise into functions."""
    named = [cuts] if isinstance(cuts, str) else list(cuts or [])
    asked = cuts == "auto" or has_patterns(named)
    asked = asked or output is not None or read is not None or tied is not None
    asked = asked or not (example is None or isinstance(example, Tensor))
    if cuts in (None, "block") and isinstance(model, nn.Module) and not isinstance(model, Partition):
        asked = asked or not (is_sequential(model) or getattr(model, "block_names", None) is not None)
    # The zoo's models whose blocks share a parameter cannot be cut into functions.
    asked = asked or (cuts in (None, "block") and getattr(model, "tied", False) is True)
    if isinstance(model, Partition):
        if asked and (cuts is not None or output is not None or read is not None or tied is not None):
            raise LayerwiseError(
                "the model is cut already; give cuts, output, read and tied to the function that cuts it."
            )
        return partition(model, layout=layout)
    if asked:
        own = getattr(model, "block_names", None)
        names = ("auto" if own is None else own) if cuts in (None, "block") else cuts
        if isinstance(model, nn.Module):
            materialise(model, example)
        return cut_at_calls(
            model, names, output=output, read=read, tied="last" if tied is None else tied, blocks=blocks, layout=layout
        )
    try:
        return partition(model, cuts, blocks=blocks, example=example, layout=layout)
    except LayerwiseError as reason:
        modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        if not named or not all(name in modules for name in named) or is_sequential(model):
            raise
        # A list is never called itself, but what it holds is.
        called = [n if type(modules[n]).forward is not nn.Module.forward else f"{n}.*" for n in named]
        raise LayerwiseError(
            f"{str(reason).removesuffix('.')}; or let it run its own forward pass: cut_at_calls(model, {called})."
        ) from reason


def check_serves(network: CallPartition, rule: Rule) -> None:
    """Raise LayerwiseError if the rule trains only other models.

    If the rule needs blocks that can be run one by one, this is recorded, and checked when the network has run.
    """
    if rule.models:
        raise LayerwiseError(
            f"rule {rule.name!r} trains only the models {', '.join(rule.models)}; choose a rule such as local_ce."
        )
    again = ""
    if any(view.stop > later.start for view, later in pairwise(groups_of(rule, [*network.cuts, "head"]))):
        again = "runs blocks in two groups under these options"
    elif has_trunk(rule):
        again = "trains a trunk that waits for later blocks"
    elif not rule.runs_once:
        again = "runs a block more than once"
    network.__dict__.update(asked_by=rule.name, again=again and f"rule {rule.name!r} {again}")


def check_reads(rule: Rule, x: Any) -> None:
    """Raise LayerwiseError if the rule uses the network's input, and that is not a single tensor."""
    if not isinstance(x, Tensor) and (rule.reads_input or type(rule).begin is not Rule.begin):
        raise LayerwiseError(
            f"rule {rule.name!r} uses the input itself, which has to be one tensor, and this batch is a "
            f"{type(x).__name__}; choose a rule such as local_ce."
        )
