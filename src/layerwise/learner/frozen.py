"""Whether frozen parameters leave anything that learns, and whether that learns what its owner expects."""

import warnings

from layerwise.errors import LayerwiseError
from layerwise.learner.build import Built


def check_what_learns(built: Built) -> None:
    """Refuse a model of which nothing learns; warn if only its first blocks learn, or none.

    A prompt or a prefix in front of a frozen network learns from the network's output. A rule that passes no gradient
    from block to block has no such signal for it. Frozen blocks before those that learn are the usual fine-tuning, and
    a frozen head is that of adapters.

    Args:
        built: the learner's groups; nothing happens after the first time.

    Raises:
        LayerwiseError: no parameter of the model and of the rule's modules learns, so that no step would change any.
    """
    if built.looked:
        return
    rule, name = built.setup.rule, type(built.setup.network.model).__name__
    whole, units = built.setup.stage.whole, [unit for group in built.groups for unit in group.units]
    if whole and not any(group.learns for group in built.groups):
        raise LayerwiseError(
            f"nothing learns: all parameters of {name} that rule {rule.name!r} trains are frozen; unfreeze what is to "
            "learn with requires_grad_(True)."
        )
    built.looked = True
    learning = [u for u in units if rule.trains(u.site) and any(p.requires_grad for p in u.block.parameters())]
    if whole and not learning:
        warnings.warn(
            f"all parameters of {name} that rule {rule.name!r} trains are frozen: only the rule's own modules learn, "
            "and the model's output does not change",
            stacklevel=2,
        )
    last = max((unit.site.index for unit in learning if not unit.site.is_head), default=len(units))
    behind = [u.site.name for u in units if u.site.index > last and not u.site.is_head and u.block.parameters()]
    if behind and rule.locality == "local" and len(built.groups) > 1:
        first = next(n for u in learning for n, p in u.block.named_parameters() if p.requires_grad)
        warnings.warn(
            f"no parameter of {', '.join(behind[:3])}{', ...' if len(behind) > 3 else ''} learns (they are frozen), "
            f"and rule {rule.name!r} passes no gradient from block to block: what learns before them ({first}, ...) "
            "does so from the readout of its own block alone, as a prompt or a prefix does; adapters in every block "
            "(LoRA) learn everywhere, and rule 'backprop' passes the gradient back.",
            stacklevel=2,
        )
