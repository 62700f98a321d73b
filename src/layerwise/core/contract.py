"""Checks a rule's contract: one sentence, with rule and block, for each return value that the engine cannot use."""

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from torch import Tensor, nn

from layerwise.core.failures import advice_on
from layerwise.core.pieces import JoinsGroups, LearnsInPart, TakesTurns
from layerwise.core.rule import BlockContext, Locality, Rule, Signal, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError, is_out_of_memory, short, suggestion


def check_rule(rule: object) -> None:
    """Raise LayerwiseError unless `rule` keeps the contract, as far as this can be checked before the first step.

    It is an instance of a `Rule` that declares its facts; it is a dataclass, so that its options
    are fields; and the value of every option with a list of words is in it. The learner checks this for every rule.
    """
    kind = rule if isinstance(rule, type) else type(rule)
    if not issubclass(kind, Rule):
        raise LayerwiseError(
            f"the rule is {rule!r}, which is not a layerwise.Rule; give the name of a rule, or an instance of one."
        )
    if isinstance(rule, type):
        raise LayerwiseError(f"the rule is the class {kind.__name__}; give an instance of it: {kind.__name__}().")
    assert isinstance(rule, Rule)
    for fact in ("name", "locality", "boundary", "flat_memory", "source"):
        if not hasattr(kind, fact):
            raise LayerwiseError(f"rule {kind.__name__} does not declare {fact!r}; set the class attribute, see Rule.")
    facts = {"name": str, "boundary": str, "flat_memory": bool, "source": str, "builds_graph": bool}
    for fact, wanted in facts.items():
        if not isinstance(getattr(kind, fact), wanted):
            raise LayerwiseError(
                f"rule {kind.__name__} declares {fact} = {short(getattr(kind, fact))}; it is of type {wanted.__name__}."
            )
    if kind.locality not in get_args(Locality):
        legal = suggestion(str(kind.locality), get_args(Locality))
        raise LayerwiseError(f"rule {rule.name!r} declares the locality {kind.locality!r}; {legal}.")
    own = [name for name, hint in inspect.get_annotations(kind).items() if "ClassVar" not in str(hint)]
    if own and "__dataclass_params__" not in kind.__dict__:
        raise LayerwiseError(
            f"rule {rule.name!r} is not a dataclass, so {own[0]!r} is not an option of it; write "
            f"@dataclass(frozen=True) above class {kind.__name__}."
        )
    for option in fields(rule):
        value, words = getattr(rule, option.name), get_args(option.type)
        if get_origin(option.type) is Literal and value not in words:
            legal = suggestion(str(value), [str(word) for word in words])
            raise LayerwiseError(f"{rule.name}'s option {option.name} is {value!r}; {legal}.")


class asking:
    """A context that turns errors of a rule's own code into a sentence that names the rule; the cause stays attached.

    A class, because every block enters it in every step, and a generator takes several times as long.

    Args:
        rule: the rule.
        what: the method and its place, such as "`signal` at block '2'".
    """

    __slots__ = ("rule", "what")

    def __init__(self, rule: Rule, what: str):
        self.rule, self.what = rule, what

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, reason: BaseException | None, traceback: Any) -> None:
        # A user's code may raise anything.
        if not isinstance(reason, Exception) or isinstance(reason, LayerwiseError) or is_out_of_memory(reason):
            return
        said = (str(reason).strip() or "no message").splitlines()[0].rstrip(".")
        advice = advice_on(said, "correct the rule, or check whether it can serve this network")
        raise LayerwiseError(
            f"rule {self.rule.name!r} fails in {self.what} ({type(reason).__name__}: {said}); {advice}."
        ) from reason


def groups_of(rule: Rule, names: Sequence[str]) -> list[range]:
    """The groups of the rule, checked.

    Args:
        rule: the rule.
        names: of all blocks, the head last.

    Raises:
        LayerwiseError: they are not ranges with rising starts that cover all sites.
    """
    with asking(rule, "`groups`"):
        groups = rule.groups(len(names) - 1)
    return _checked_groups(rule, "groups", groups, names)


def groups_of_update(rule: Rule, update: int, names: Sequence[str]) -> list[range]:
    """The groups of one update, checked; see `groups_of`."""
    if not isinstance(rule, JoinsGroups):
        return groups_of(rule, names)
    with asking(rule, f"`groups_at` for update {update}"):
        groups = rule.groups_at(update, len(names) - 1)
    return _checked_groups(rule, "groups_at", groups, names)


def learns_in_update(rule: Rule, update: int, site: Site) -> bool:
    """Whether the group that begins at the site learns in one update, checked.

    Raises:
        LayerwiseError: the rule says neither True nor False.
    """
    if not isinstance(rule, TakesTurns):
        return True
    with asking(rule, f"`learns_at` for update {update} at block {site.name!r}"):
        answer = rule.learns_at(update, site)
    if not isinstance(answer, bool):
        raise LayerwiseError(
            f"rule {rule.name!r} answers whether block {site.name!r} learns in update {update} with "
            f"{_in_words(answer)}; return True or False from `learns_at`."
        )
    return answer


def sites_in_update(rule: LearnsInPart, update: int, names: Sequence[str]) -> frozenset[int]:
    """The sites that learn in one update, checked.

    Raises:
        LayerwiseError: there are none, or they are not sites.
    """
    assert isinstance(rule, Rule)
    with asking(rule, f"`sites_at` for update {update}"):
        sites = frozenset(rule.sites_at(update, len(names) - 1))
    if not sites or not sites <= set(range(len(names))):
        raise LayerwiseError(
            f"rule {rule.name!r} lets the sites {sorted(sites)} learn in update {update}; return one or more of 0 to "
            f"{len(names) - 1} from `sites_at`."
        )
    return sites


def _checked_groups(rule: Rule, method: str, groups: Any, names: Sequence[str]) -> list[range]:
    last = len(names) - 1
    advice = f"return from `{method}` ranges with rising starts that cover the sites 0 to {last}, the head included"
    if not isinstance(groups, (list, tuple)):
        raise LayerwiseError(f"rule {rule.name!r} gives {_in_words(groups)} for its groups of blocks; {advice}.")
    covered, start = 0, -1
    for sites in groups:
        if not isinstance(sites, range):
            raise LayerwiseError(f"rule {rule.name!r} gives {_in_words(sites)} for a group of blocks; {advice}.")
        if sites.step != 1 or len(sites) == 0 or sites.start <= start or sites.stop > last + 1:
            raise LayerwiseError(f"rule {rule.name!r} gives the group {sites} of {last + 1} sites; {advice}.")
        if sites.start > covered:
            break
        covered, start = max(covered, sites.stop), sites.start
    if covered <= last:
        raise LayerwiseError(f"rule {rule.name!r} puts block {names[covered]!r} into no group; {advice}.")
    return list(groups)


def check_begin(rule: Rule, start: Any) -> None:
    """Raise LayerwiseError unless `begin` has returned an input, which is a tensor, and a message."""
    if type(rule).begin is Rule.begin:
        return
    advice = "return two things from `begin`, the first block's input, a tensor, and the first message"
    if not isinstance(start, tuple) or len(start) != 2:
        what = f"{len(start)} things" if isinstance(start, tuple) else _in_words(start)
        raise LayerwiseError(f"rule {rule.name!r} begins with {what}; {advice}.")
    if not isinstance(start[0], Tensor):
        raise LayerwiseError(f"rule {rule.name!r} begins with an input that is {_in_words(start[0])}; {advice}.")


def check_output(rule: Rule, site: Site, out: Any) -> None:
    """Raise LayerwiseError unless a block's output is a tensor."""
    if not isinstance(out, Tensor):
        raise LayerwiseError(
            f"rule {rule.name!r} runs block {site.name!r} to {_in_words(out)}; return the block's output from `run`."
        )


def check_signal(rule: Rule, ctx: BlockContext, signal: object) -> None:
    """Raise LayerwiseError unless the engine can use the result of `signal`.

    The loss is a scalar, the cotangent has the shape of the block's output, the metrics are scalar tensors,
    or functions.
    """
    where = f"rule {rule.name!r} gave block {ctx.site.name!r}"
    if not isinstance(signal, Signal):
        raise LayerwiseError(f"{where} {_in_words(signal)} and no Signal; return Signal(...) from `signal`.")
    loss, cotangent, output = signal.loss, signal.cotangent, signal.output
    if loss is not None and not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point()):
        raise LayerwiseError(f"{where} a loss that is {_in_words(loss)}; give a scalar tensor, such as loss.mean().")
    if cotangent is not None and not (isinstance(cotangent, Tensor) and cotangent.shape == ctx.h.shape):
        raise LayerwiseError(
            f"{where} a cotangent that is {_in_words(cotangent)}; give a tensor of the output's shape "
            f"{tuple(ctx.h.shape)}."
        )
    if cotangent is not None and not rule.builds_graph:
        raise LayerwiseError(f"{where} a cotangent, and it builds no graph; give gradients of parameters.")
    _check_gradients(where, signal.gradients)
    # Rules that join other samples to the batch, such as negatives, may pass on those of the labels alone.
    if output is not None and not (
        isinstance(output, Tensor) and output.shape[:1] in (ctx.h.shape[:1], ctx.y.shape[:1])
    ):
        raise LayerwiseError(
            f"{where} an output that is {_in_words(output)}; give a tensor with as many samples as the block's output, "
            f"{tuple(ctx.h.shape)}, or leave it out."
        )
    if not isinstance(signal.metrics, dict) or not all(isinstance(name, str) for name in signal.metrics):
        raise LayerwiseError(
            f"{where} metrics that are {_in_words(signal.metrics)}; give a dict from names to scalars."
        )
    for name, value in signal.metrics.items():
        real = isinstance(value, Tensor) and value.dim() == 0 and not (value.is_complex() or value.is_meta)
        if not real and not callable(value):
            raise LayerwiseError(f"{where} the metric {name!r}, which is {_in_words(value)}; give a scalar tensor.")


def _check_gradients(where: str, given: object) -> None:
    """Raise LayerwiseError unless gradients are tensors of the shapes of their parameters."""
    if not isinstance(given, dict):
        raise LayerwiseError(f"{where} gradients that are {_in_words(given)}; give a dict from parameters to tensors.")
    for parameter, gradient in given.items():
        if not isinstance(parameter, nn.Parameter):
            raise LayerwiseError(f"{where} a gradient of {_in_words(parameter)}; give gradients of parameters.")
        if not (isinstance(gradient, Tensor) and gradient.shape == parameter.shape):
            raise LayerwiseError(
                f"{where} a gradient that is {_in_words(gradient)} of a parameter of shape {tuple(parameter.shape)}; "
                "give a tensor of its shape."
            )


def check_sent_back(rule: Rule, site: Site, sent: Any, out: Tensor) -> None:
    """Raise LayerwiseError unless a group sends None to the trunk, or a tensor of the shape of its output."""
    if sent is not None and not (isinstance(sent, Tensor) and sent.shape == out.shape):
        raise LayerwiseError(
            f"rule {rule.name!r} sends {_in_words(sent)} back from block {site.name!r}; return from `to_trunk` a "
            f"tensor of the shape of the trunk's output {tuple(out.shape)}, or None."
        )


def check_prediction(rule: Rule, prediction: Any, task: Task, samples: int | None) -> None:
    """Raise LayerwiseError unless `predict` has returned outputs of the task: `(B, ..., K)`, `(B, K, H, W)` per pixel.

    Args:
        rule: the rule.
        prediction: what it predicts.
        task: knows the number of outputs K.
        samples: the number of samples B, where it is known.
    """
    fits = isinstance(prediction, Tensor) and prediction.is_floating_point() and prediction.dim() > 1
    per_pixel = task.positions == "pixel"
    right = fits and (task.kind == "loss" or prediction.shape[1 if per_pixel else -1] == task.outputs)
    if not (right and samples in (None, len(prediction))):
        places = f"{task.outputs}, ..." if per_pixel else f"..., {task.outputs}"
        raise LayerwiseError(
            f"rule {rule.name!r} predicts {_in_words(prediction)}; return from `predict` logits of shape "
            f"({'B' if samples is None else samples}, {places})."
        )


def _in_words(value: object) -> str:
    """Describe a value for an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + ("" if value.is_floating_point() else f" ({value.dtype})")
    return "None" if value is None else f"a {type(value).__name__}"
