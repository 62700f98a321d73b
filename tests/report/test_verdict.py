"""The sentences of a comparison say what its figures say, and no more."""

import pytest

from layerwise.core.tasks import metric_of
from layerwise.report.verdict import depth_table, verdict

MIB = 2**20


def rule(difference=None, held=None, n=3, steps=500.0):
    low_high = dict(zip(("mean", "low", "high"), difference, strict=True)) if difference else None
    own = {"n": n, "failed": [], "steps": {"mean": steps, "sd": 0.0, "n": n}, "difference_to_backprop": low_high}
    return own | ({"held_at": {str(depth): size * MIB for depth, size in held.items()}} if held else {})


def test_an_interval_that_holds_zero_is_no_difference():
    assert verdict({"sll": rule((-0.02, -0.05, 0.01)), "backprop": rule()})[0] == (
        "No rule differs from backprop beyond chance."
    )


@pytest.mark.parametrize("edge", [(-0.02, -0.04, 0.0), (0.02, 0.0, 0.04)])
def test_an_interval_that_touches_zero_is_no_difference(edge):
    assert verdict({"sll": rule(edge), "backprop": rule()})[0].startswith("No rule differs")


def test_only_rules_beyond_chance_are_named():
    found = verdict({"sll": rule((-0.02, -0.05, 0.01)), "sid": rule((0.02, 0.01, 0.03)), "backprop": rule()})[0]
    assert found == "Beyond chance, sid differs from backprop by +2.00 (+1.00 .. +3.00) points; no other rule differs."


def test_without_intervals_or_baseline_nothing_is_claimed():
    assert verdict({"sll": rule((-0.02, None, None), n=1), "backprop": rule(n=1)})[0].startswith("Differences are not")
    assert verdict({"sll": rule()})[0].startswith("Nothing is said about differences")
    assert verdict({"sll": rule(n=0)}) == []


def test_numbers_have_no_points():
    found = verdict({"sll": rule((0.5, 0.2, 0.8)), "backprop": rule()}, metric_of("regression"))[0]
    assert "points" not in found


def test_memory_is_compared_at_the_largest_depth_and_flatness_over_all():
    grows = rule((0, -1, 1), {4: 1, 16: 2, 64: 4})
    flat = rule((0, -1, 1), {4: 3, 16: 3, 64: 3})
    found = verdict({"a": grows, "b": flat, "backprop": rule(held={4: 2, 16: 4, 64: 12})})[1]
    assert found.startswith("At 64 blocks a step of b holds 3 MiB of activations and gradients, 75 % less than")
    assert found.endswith("from 4 to 64 blocks it is constant for b.")


def test_a_rule_that_holds_more_is_said_to_hold_more():
    found = verdict({"a": rule((0, -1, 1), {4: 3}), "backprop": rule(held={4: 2})})[1]
    assert "50 % more than" in found
    assert "constant" not in found  # one depth shows no growth


def test_few_updates_chance_and_tuning_are_told():
    few = verdict({"sll": rule(steps=199.0), "backprop": rule(steps=150.0)}, chance=0.5)
    assert "Runs made 150 to 199 updates; always answering the most frequent class gives 50.0 %" in few[1]
    assert "Under 200 updates" in few[1]
    assert "tuned" in few[2]
    assert len(verdict({"sll": rule(), "backprop": rule()}, tuned=4)) == 2


def test_a_missing_depth_is_a_dash():
    table = depth_table({"a": rule(held={4: 1}), "b": rule(held={16: 2})}).splitlines()
    assert [line.split()[-2:] for line in table[1:]] == [["1.00", "-"], ["-", "2.00"]]
    assert depth_table({"a": rule()}) == ""


def test_a_rule_without_an_interval_is_not_said_to_be_as_good_as_the_baseline():
    untold = {"sid": rule((-0.5, None, None), n=2), "svp": rule(n=0), "backprop": rule()}
    equal = verdict({"sll": rule((-0.02, -0.05, 0.01))} | untold)[0]
    assert equal == (
        "sll: no difference from backprop beyond chance; of sid, svp it is not known, with too few finished seeds."
    )
    worse = verdict({"sll": rule((-0.1, -0.2, -0.05))} | untold)[0]
    assert "no other rule" not in worse
    assert "of sid, svp it is not known" in worse


def test_without_another_finished_rule_there_is_nothing_to_compare():
    for rivals in ({}, {"sll": rule(n=0)}):
        assert "no rule besides backprop has finished" in verdict(rivals | {"backprop": rule()})[0]


def test_updates_are_counted_and_only_those_of_finished_runs():
    assert "Every run made 50 updates" in verdict({"backprop": rule(steps=197.0)}, accumulate=4)[1]
    failed = rule((0, -1, 1), n=2) | {"failed": [{"seed": 2, "reason": "diverged"}]}
    assert "Every finished run made 500" in verdict({"sll": failed, "backprop": rule()})[1]


def test_memory_is_called_constant_only_from_the_depth_at_which_it_was_measured():
    found = verdict({"a": rule((0, -1, 1), {16: 1, 64: 1}), "backprop": rule(held={4: 2, 16: 4, 64: 12})})[1]
    assert "constant" not in found
