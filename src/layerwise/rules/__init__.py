"""Learning rules by name: `create("sll", weight=0.5)`; one file per rule.

A rule from another package is found through the entry point group `layerwise.rules`:

    [project.entry-points."layerwise.rules"]
    my_rule = "my_package:MyRule"

Files that several rules share:

    readout.py       a loss per block: groups, readouts, labels
    ahead.py         heads that read through copies of the next block's first layer
    windows.py       losses of heads some blocks ahead
    patches.py       readouts of patches, averaged
    feedback.py      feedback matrices, and the error at the outputs
    settling.py      states of all blocks that settle before the update
    label_input.py   labels written into images
    words.py         a rule with its options in one word, `sll:overlap=1`
"""

import dataclasses
from importlib.metadata import entry_points

from layerwise.core import own_code
from layerwise.core.rule import BatchContext, BlockContext, Rule, Signal, Site
from layerwise.errors import LayerwiseError, short, suggestion, unknown, why
from layerwise.rules.auglocal import AugLocal
from layerwise.rules.backprop import Backprop
from layerwise.rules.backprop_checkpoint import BackpropCheckpoint
from layerwise.rules.backprop_fused import BackpropFused
from layerwise.rules.backprop_offload import BackpropOffload
from layerwise.rules.block_rota import BlockRota
from layerwise.rules.boosted import Boosted
from layerwise.rules.continual_backprop import ContinualBackprop
from layerwise.rules.controls import DeepSupervision, LastLayer
from layerwise.rules.counter_current import CounterCurrent
from layerwise.rules.dgl import DGL
from layerwise.rules.equilibrium_propagation import EquilibriumPropagation
from layerwise.rules.feedback_alignment import FeedbackAlignment
from layerwise.rules.forward_forward import ForwardForward
from layerwise.rules.forward_gradient import ForwardGradient
from layerwise.rules.gradient_reconciliation import GradientReconciliation
from layerwise.rules.graph_forward import GraphForward
from layerwise.rules.hebbian_global import HebbianGlobal, HebbianLocal
from layerwise.rules.hedge_backprop import HedgeBackprop
from layerwise.rules.highway_backprop import HighwayBackprop
from layerwise.rules.inference_learning import InferenceLearning
from layerwise.rules.infopro import InfoPro
from layerwise.rules.interlocking import Interlocking
from layerwise.rules.layer_collaboration import LayerCollaboration
from layerwise.rules.likelihood_ratio import LikelihoodRatio
from layerwise.rules.local_ce import LocalCE
from layerwise.rules.lopt import FreezeLower, LoPT
from layerwise.rules.mono_forward import MonoForward
from layerwise.rules.noprop import NoPropCT, NoPropDT, NoPropFM
from layerwise.rules.pepita import Pepita
from layerwise.rules.periodic_guidance import PeriodicGuidance
from layerwise.rules.predictive_coding import PredictiveCoding
from layerwise.rules.predsim import PredSim
from layerwise.rules.product_feedback_alignment import ProductFeedbackAlignment
from layerwise.rules.scalable_ff import ScalableFF
from layerwise.rules.sid import SID, SIDCascade
from layerwise.rules.sll import SLL
from layerwise.rules.solo import SOLO
from layerwise.rules.ssl_local import SSLLocal
from layerwise.rules.stationary_feedback import StationaryFeedback
from layerwise.rules.svp import SVP
from layerwise.rules.synthetic_gradient import SyntheticGradient
from layerwise.rules.zeroth_order import ZerothOrder

_BUILT_IN: tuple[type[Rule], ...] = (
    SLL,
    SVP,
    SID,
    SIDCascade,
    LocalCE,
    MonoForward,
    PredSim,
    SOLO,
    DGL,
    AugLocal,
    InfoPro,
    Interlocking,
    GradientReconciliation,
    PeriodicGuidance,
    ForwardForward,
    LayerCollaboration,
    ScalableFF,
    CounterCurrent,
    FeedbackAlignment,
    ProductFeedbackAlignment,
    Pepita,
    ForwardGradient,
    LikelihoodRatio,
    GraphForward,
    NoPropDT,
    NoPropCT,
    NoPropFM,
    Boosted,
    SSLLocal,
    LoPT,
    SyntheticGradient,
    PredictiveCoding,
    EquilibriumPropagation,
    InferenceLearning,
    HighwayBackprop,
    HebbianGlobal,
    HebbianLocal,
    StationaryFeedback,
    Backprop,
    BackpropCheckpoint,
    BackpropFused,
    BackpropOffload,
    BlockRota,
    ZerothOrder,
    HedgeBackprop,
    ContinualBackprop,
    DeepSupervision,
    LastLayer,
    FreezeLower,
)

FORMS = {"FILE.py:Class": "a rule of your own: a class in a file"}
"""Forms of the names of rules from elsewhere, with descriptions."""


def names() -> list[str]:
    """Names of all rules, the built-in ones first.

    >>> names()[:2]
    ['sll', 'svp']
    """
    built_in = [rule.name for rule in _BUILT_IN]
    outside = sorted(point.name for point in entry_points(group="layerwise.rules"))
    return built_in + [name for name in outside if name not in built_in]


def get(name: str, recorded: str | None = None) -> type[Rule]:
    """The class of the rule called `name`.

    Args:
        name: one of `names()`, or `FILE.py:Class` for a rule of your own, whose file is run.
        recorded: SHA-256 of that file when a run began; the file is refused if it has changed since.

    Raises:
        LayerwiseError: there is no such rule.
    """
    if own_code.is_own(name):
        rule = own_code.load(name, recorded)
        if not (isinstance(rule, type) and issubclass(rule, Rule) and dataclasses.is_dataclass(rule)):
            raise LayerwiseError(
                f"{name!r} names no rule; name a frozen dataclass that inherits from layerwise.rules.Rule."
            )
        return rule
    for rule in _BUILT_IN:
        if rule.name == name:
            return rule
    for point in entry_points(group="layerwise.rules", name=name):
        rule = point.load()
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise LayerwiseError(
                f"the entry point layerwise.rules:{name} gives {rule!r}, which is not a subclass of "
                "layerwise.rules.Rule; correct the package that declares it."
            )
        return rule
    raise unknown("rule", name, [*names(), *FORMS])


def name_of(rule: Rule) -> str:
    """The name of a rule: its own, or `FILE.py:Class`.

    >>> name_of(create("sll"))
    'sll'
    """
    found = own_code.origin(type(rule))
    return rule.name if found is None else found[0]


def create(name: str, **options: object) -> Rule:
    """Make a rule by name, with any of its fields as options.

    Args:
        name: as for `get`.
        options: fields of the rule's dataclass.

    Raises:
        LayerwiseError: an unknown rule or option, or a value that the rule refuses.

    >>> create("sll", weight=0.5).weight
    0.5
    """
    if not isinstance(name, str):
        raise LayerwiseError(f"the rule is {short(name)}; give its name.")
    rule = get(name)
    legal = [f.name for f in dataclasses.fields(rule)]
    for option in options:
        if option not in legal:
            raise LayerwiseError(f"rule {name!r} has no option {option!r}; {suggestion(option, legal)}.")
    try:
        return rule(**options)
    except LayerwiseError:
        raise
    except Exception as reason:  # from the user's code: a field without a default, an undefined annotation
        raise LayerwiseError(
            f"rule {name!r} cannot be made ({type(reason).__name__}: {why(reason)}); correct its class: every option "
            "has a type and a default."
        ) from reason


__all__ = [
    "DGL",
    "SID",
    "SLL",
    "SOLO",
    "SVP",
    "AugLocal",
    "Backprop",
    "BackpropCheckpoint",
    "BackpropFused",
    "BackpropOffload",
    "BatchContext",
    "BlockContext",
    "BlockRota",
    "Boosted",
    "ContinualBackprop",
    "CounterCurrent",
    "DeepSupervision",
    "EquilibriumPropagation",
    "FeedbackAlignment",
    "ForwardForward",
    "ForwardGradient",
    "FreezeLower",
    "GradientReconciliation",
    "GraphForward",
    "HebbianGlobal",
    "HebbianLocal",
    "HedgeBackprop",
    "HighwayBackprop",
    "InferenceLearning",
    "InfoPro",
    "Interlocking",
    "LastLayer",
    "LayerCollaboration",
    "LikelihoodRatio",
    "LoPT",
    "LocalCE",
    "MonoForward",
    "NoPropCT",
    "NoPropDT",
    "NoPropFM",
    "Pepita",
    "PeriodicGuidance",
    "PredSim",
    "PredictiveCoding",
    "ProductFeedbackAlignment",
    "Rule",
    "SIDCascade",
    "SSLLocal",
    "ScalableFF",
    "Signal",
    "Site",
    "StationaryFeedback",
    "SyntheticGradient",
    "ZerothOrder",
    "create",
    "get",
    "name_of",
    "names",
]
