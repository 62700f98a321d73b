"""The folder of a comparison: a damaged record is measured again or refused, and no two rules share a folder."""

import pytest

from layerwise.compare import grid as compare
from layerwise.compare import record
from layerwise.errors import LayerwiseError


def test_two_rules_never_share_a_folder():
    """Their runs would be taken for each other: `/` and `:` become `-` in names of folders."""
    compare.check_folders(["a/b.py:Rule", "a/c.py:Rule", "sll", "sll:overlap=1"])
    with pytest.raises(LayerwiseError, match=r"the runs of a/b\.py:Rule and a-b\.py:Rule would lie in one folder"):
        compare.check_folders(["sll", "a/b.py:Rule", "a-b.py:Rule"])


def test_a_rule_with_half_of_its_figures_is_measured_again(tmp_path):
    """Time left and budgets divide by these figures."""
    whole = {"flops_per_step": 9.0, "seconds_per_step": 0.1, "steps_per_epoch": 3}
    for missing in whole:
        half = {name: value for name, value in whole.items() if name != missing}
        record.write_record(tmp_path, "layerwise compare", ["sll", "backprop"], 1, {}, {"sll": half, "backprop": whole})
        assert record.kept_plan(tmp_path, {}) == {"backprop": whole}


@pytest.mark.parametrize("damage", [{"changes": {"policy": "all"}}, {"flops_per_step": None}])
def test_a_recorded_setting_that_is_not_the_rules_own_is_a_sentence(damage, tmp_path):
    grid = compare.Grid(compare.CompareOptions(rules=("sll",), peak="1MiB", out=str(tmp_path)))
    fit = {"peak": 2**20, "held": 1, "reached": True, "changes": {}, "seconds_per_step": 0.1, "flops_per_step": 9.0}
    fit = {name: value for name, value in (fit | damage).items() if value is not None}
    grid.plan = {"sll": {"held_bytes": 1, "fit": fit}}

    class Pool:
        def run(self, tasks, *_, **__):
            assert not tasks

    with pytest.raises(LayerwiseError, match="the setting of sll under the peak is not its own"):
        grid._bring_under(Pool())


def bring_under(tmp_path, **edits):
    """Read the recorded setting of `sll` under a peak of 1 MiB, with some of its fields edited."""
    grid = compare.Grid(compare.CompareOptions(rules=("sll",), peak="1MiB", out=str(tmp_path)))
    fit = {"peak": 2**20, "held": 1, "reached": True, "changes": {}, "seconds_per_step": 0.1, "flops_per_step": 9.0}
    grid.plan = {"sll": {"held_bytes": 1, "fit": fit | edits}}
    grid._bring_under(type("Pool", (), {"run": lambda *_, **__: None})())
    return grid


@pytest.mark.parametrize("edits", [{"peak": 2**10}, {"held": 2**21}, {"reached": False}])
def test_a_recorded_setting_of_another_peak_is_refused(edits, tmp_path):
    """A row must not be shown as within the peak if it is not, nor left out if it is."""
    assert not bring_under(tmp_path).unreached
    with pytest.raises(LayerwiseError, match="what sll holds does not belong to the peak 1048576"):
        bring_under(tmp_path, **edits)


def test_memory_at_something_that_is_no_number_of_blocks_is_refused(tmp_path):
    plan = {"flops_per_step": 9.0, "seconds_per_step": 0.1, "steps_per_epoch": 3}
    for depth in ("x", "0", "-4", "4.5", ""):
        record.write_record(tmp_path, "layerwise compare", ["sll"], 1, {}, {"sll": plan | {"held_at": {depth: 9}}})
        with pytest.raises(LayerwiseError, match=r"compare\.json is damaged"):
            record.kept_plan(tmp_path, {})
