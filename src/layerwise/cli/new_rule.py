"""`layerwise new-rule`: writes a new learning rule in one file, and its tests, for the user to change."""

import contextlib
import keyword
import os
import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from layerwise.cli import catalogue
from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, read_bytes, shown
from layerwise.runs.writing import write_atomically

RULE = '''\
"""{class_name}: a learning rule of my own."""

from dataclasses import dataclass
from typing import ClassVar

from layerwise import BlockContext, Rule, Signal, Site
from layerwise.core.ranges import PositiveFloat
from layerwise.core.rule import Locality, cross_entropy_at_head
from layerwise.core.tasks import Task
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class {class_name}(Rule):
    r"""Every block maximises the likelihood of the labels under a linear readout of its own.

    With the block's output $h_i$, flattened, and readout $W_i$, block and readout descend on
    $\\lambda \\cdot \\mathrm{{CE}}(y, W_i h_i)$. The head has its own cross-entropy.
    """

    weight: PositiveFloat = 1.0
    r"""Factor $\\lambda$ of the blocks' losses."""

    name: ClassVar[str] = "{name}"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = True
    source: ClassVar[str] = "my own"
    restrictions: ClassVar[str] = "One label per sample; all batches have the shape of the first."
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The readout of a block; `h` is its output for two samples, `(2, ...)`."""
        return None if site.is_head else nn.Linear(h[0].numel(), task.outputs)

    def signal(self, ctx: BlockContext) -> Signal:
        """The loss of a block: its gradient trains the block and the readout, and goes no further."""
        if ctx.auxiliary is None:
            return cross_entropy_at_head(ctx)
        logits = ctx.auxiliary(ctx.h.flatten(1))
        return Signal(loss=self.weight * F.cross_entropy(logits, ctx.y))
'''

TESTS = '''\
"""The rule learns, on its own and by name, and no gradient leaves a block."""

import torch
from layerwise import Learner
from layerwise.models import create
from {name} import {class_name}


def problem():
    torch.manual_seed(0)
    return create("mlp", (1, 8, 8), 10, depth=3, width=32), torch.randn(64, 1, 8, 8), torch.randint(10, (64,))


def test_it_learns():
    model, x, y = problem()
    learner = Learner(model, {class_name}(), lr=1e-2)
    losses = [learner.step(x, y).loss.item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_every_block_learns():
    model, x, y = problem()
    before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
    Learner(model, {class_name}()).step(x, y)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_without_its_loss_a_block_stays_as_it_is():
    """Nothing but its own loss reaches a block: with a factor near zero, plain SGD moves the head alone."""
    model, x, y = problem()
    before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
    Learner(model, {class_name}(weight=1e-30), optimizer="sgd", weight_decay=0.0).step(x, y)
    moved = {{name for name, p in model.named_parameters() if not torch.equal(p, before[name])}}
    assert moved == {{name for name in before if name.startswith("head")}}
'''


def hides(name: str) -> bool:
    """Whether a file of this name would be imported in place of a package that is installed.

    >>> hides("typing"), hides("a_rule_of_mine")
    (True, False)
    """
    here = {"", os.getcwd()}
    installed = PathFinder.find_spec(name, [place for place in sys.path if place not in here])
    return installed is not None or name in ("layerwise", *sys.stdlib_module_names)


def _holds(path: Path, text: str) -> bool:
    """Whether a file has this content."""
    content = text.encode()
    return kind_of(path) == "file" and path.stat().st_size == len(content) and read_bytes(path) == content


def new_rule_command(argv: list[str]) -> int:
    """`layerwise new-rule NAME [FOLDER]`: write a rule and its tests."""
    if not 1 <= len(argv) <= 2 or any(word.startswith("-") for word in argv):
        raise LayerwiseError("new-rule takes a name and optionally a folder: layerwise new-rule my_rule.")
    name, folder = argv[0], Path(argv[1] if len(argv) == 2 else ".")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name) or keyword.iskeyword(name):
        raise LayerwiseError(
            f"{name!r} cannot be the name of a rule; choose lower-case letters, digits and _, first a letter, such as "
            "my_rule."
        )
    if name in catalogue.rules():
        raise LayerwiseError(f"there is a rule {name!r} already, see layerwise describe {name}; choose another name.")
    if kind_of(folder) != "folder":
        raise LayerwiseError(f"there is no folder {shown(folder)}; make it first.")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    words = {"name": name, "class_name": class_name}
    texts = {folder / f"{name}.py": RULE.format(**words), folder / f"test_{name}.py": TESTS.format(**words)}
    there = [path for path in texts if kind_of(path) is not None]
    for path in there:
        # A command that was killed between the two files leaves one, which is as good as new.
        if len(there) == len(texts) or not _holds(path, texts[path]):
            raise LayerwiseError(f"{shown(path)} exists already and is not overwritten; choose another name.")
    if hides(name):
        raise LayerwiseError(f"a file {name}.py would hide the Python package {name!r}; choose another name.")
    try:
        for path, text in texts.items():
            write_atomically(path, text)
    except LayerwiseError:
        for path in texts:  # half of a rule is of no use
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    rule, tests = texts
    print(f"wrote {rule} and {tests}; change them, and")
    install = "" if find_spec("pytest") else "pip install pytest && "  # the set-up to use layerwise brings none
    print(f"  test it:    {install}pytest {tests}")
    print(f"  train it:   layerwise train --rule {rule}:{class_name}")
    print(f"  compare it: layerwise compare --rule {rule}:{class_name} local_ce backprop")
    return 0
