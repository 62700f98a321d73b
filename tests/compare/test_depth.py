"""Memory at other depths: the bytes of the bench; none without a depth, and no long measurement by default."""

import pytest

from layerwise import models, rules
from layerwise.compare.depth import USUAL, depths_asked, depths_of, held_at
from layerwise.errors import LayerwiseError
from layerwise.measure.bench_memory import memory_of
from layerwise.runs.options import TrainOptions

MLP = TrainOptions(model=models.options("mlp")(width=16), batch_size=32, threads=1)


@pytest.mark.parametrize("rule", ["sll", "backprop"])
def test_it_is_what_the_bench_measures(rule):
    found = held_at(TrainOptions(**{**vars(MLP), "rule": rules.create(rule)}), (2, 5))
    for depth in (2, 5):
        row = memory_of(rule, "mlp", depth, shape=(1, 8, 8), batch_size=32, width=16)
        assert found[str(depth)] == row["activations"] + row["gradients"]


@pytest.mark.parametrize("text", ["", "4,", "0", "-1", "4;16", "1_0", "１６", "1e3", "9" * 9, "all"])
def test_a_list_that_is_none_is_refused(text):
    with pytest.raises(LayerwiseError, match="is not a list such as 4,16,64"):
        depths_asked(text)


def test_what_is_asked_for_is_measured_and_the_usual_where_it_is_quick():
    quick, slow = {"seconds_per_step": 1e-3}, {"seconds_per_step": 1.0}
    assert depths_of("sll", MLP, None, quick, 10) == (USUAL, "")
    depths, why = depths_of("sll", MLP, None, slow, 10)
    assert depths == () and "--depths 4,16,64" in why
    assert depths_of("sll", MLP, None, slow, 10**6) == (USUAL, "")  # little beside such a run
    assert depths_of("sll", MLP, (8,), slow, 10) == ((8,), "")
    for label, asked, plan in (("sll", (), quick), ("sll:model.depth=2", None, quick), ("sll", None, {})):
        assert depths_of(label, MLP, asked, plan, 10) == ((), "")
