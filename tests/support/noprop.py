"""Learners of the three NoProp rules on their own models, and one batch."""

import pytest
import torch.nn.functional as F

from layerwise import Learner, create_rule
from support.nets import CLASSES, batches, net

X, Y = batches(1)[0]
HOT = F.one_hot(Y, CLASSES).float()
MANY_X, MANY_Y = X[:1].expand(4096, -1, -1, -1), Y[:1].expand(4096)
KINDS = {"noprop_dt": "noprop", "noprop_ct": "noprop_ct", "noprop_fm": "noprop_fm"}
every_rule = pytest.mark.parametrize("rule", KINDS)
every_label = pytest.mark.parametrize("labels", ["one_hot", "learned", "prototype"])


def made(rule, options=None, **model):
    """A learner of one of the three rules on its own model."""
    return Learner(net(KINDS[rule], **model), create_rule(rule, **(options or {})), example=X)


IDLE = pytest.mark.filterwarnings("ignore:these parameters of block .* get no gradient:UserWarning")
"""For tests whose network gives logits without a separate part."""
