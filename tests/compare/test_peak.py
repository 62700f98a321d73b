"""A comparison under a peak of memory: each rule with its own options, timed against plain backpropagation."""

import contextlib
import csv
import io
import json
from dataclasses import replace

import pytest
from support.runs import result, split

from layerwise.cli.main import main
from layerwise.compare import peak as peaks
from layerwise.compare.rules_asked import read_rules
from layerwise.measure.energy import EnergyMeter, domains
from layerwise.memory.fitting import Fit
from layerwise.report.frontier import path_of
from layerwise.runs.options import TrainOptions

COMMAND = split(
    "compare --rule sll backprop backprop_fused --seeds 1 --steps 3 --model vgg --model.width 4 --model.depth 2 "
    "--batch-size 64 --train-samples 256 --jobs 1 --no-report"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison at a peak that backpropagation reaches in parts alone, and a rule without parts not at all."""
    folder = tmp_path_factory.mktemp("peak") / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setenv("PYTHONWARNINGS", "ignore::UserWarning")  # of batch norm, in the workers
        assert main([*COMMAND, "--peak", "200KiB", "--out", str(folder)]) == 0
    (folder / "workers.log").write_text(told.getvalue())
    return folder


def fits(folder):
    return {rule: found["fit"] for rule, found in json.loads((folder / "summary.json").read_text())["rules"].items()}


@pytest.mark.slow
def test_every_rule_trains_within_the_peak_or_says_how_far_it_came(folder):
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    found = fits(folder)
    assert [found[rule]["reached"] for rule in ("sll", "backprop", "backprop_fused")] == [True, True, False]
    for rule in ("sll", "backprop"):
        own = result(folder / "runs" / rule / "seed0")
        held = sum(own["memory_mib"][part] for part in ("activations", "gradients"))
        assert held * 2**20 == pytest.approx(found[rule]["held"])
        assert held * 1024 <= 200
        assert own["options"]["micro"] == found[rule]["changes"].get("micro", 1) > 1
        assert "batch norm" in found[rule]["notes"][0]
        assert found[rule]["ratio"] > 0
    assert found["backprop"]["ratio_as_asked"] == 1
    assert found["backprop_fused"]["held"] == found["backprop_fused"]["held_as_asked"] > 200 * 1024
    assert not (folder / "runs" / "backprop_fused").exists()
    rows = {row["rule"]: row for row in csv.DictReader((folder / "results.csv").read_text().splitlines())}
    assert rows["backprop_fused"]["status"] == "unreached"
    told = (folder / "workers.log").read_text()
    assert "does not reach 0.195 MiB: 0." in told
    assert "note: sll, backprop: running statistics (batch norm)" in told
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert 'id="frontier_accuracy"' in page and 'id="frontier_seconds"' in page


@pytest.mark.slow
def test_repeated_it_searches_and_trains_nothing(folder, monkeypatch, capsys):
    before = (folder / "results.csv").read_bytes(), json.loads((folder / "summary.json").read_text())["rules"]
    monkeypatch.setattr("layerwise.compare.pool.WorkerPool._ask", None)
    assert main([*COMMAND, "--peak", "200KiB", "--out", str(folder)]) == 0
    assert ((folder / "results.csv").read_bytes(), json.loads((folder / "summary.json").read_text())["rules"]) == before
    assert main([*COMMAND, "--peak", "100KiB", "--out", str(folder)]) == 2
    assert 'holds a comparison with peak = "200KiB"' in capsys.readouterr().err


@pytest.mark.parametrize("peak", ["12 parsecs", "-5MiB", "0MiB"])
def test_a_wrong_peak_is_one_sentence(peak, tmp_path, capsys):
    assert main([*COMMAND, f"--peak={peak}", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "give a size larger than 0 with its unit" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_fastest_way_within_the_peak_is_taken(monkeypatch):
    """Of the policies that come under the peak; one that does not is out, however fast."""
    asked = read_rules(["backprop_checkpoint"], TrainOptions())["backprop_checkpoint"]
    held = {"all": 50, "matmul": 90, "attention": 200}

    class PeakProblem:
        @classmethod
        def of(cls, options):
            return cls()

        def fit(self, way, peak):
            size = held[way.rule.policy]
            return Fit(2, size, size <= peak, tried=((1, 4 * size),)), ()

    def timed(problem, asked, ways, baseline, rounds):
        seconds = {"all": 3.0, "matmul": 2.0, "attention": 1.0}
        found = [{"ratio": seconds[way.rule.policy], "seconds_per_step": seconds[way.rule.policy]} for way in ways]
        return {"as_asked": 1.5, "ways": found}

    monkeypatch.setattr(peaks, "PeakProblem", PeakProblem)
    monkeypatch.setattr(peaks, "timed", timed)
    found = peaks.bring_under(asked, asked, 100, ())
    assert found["changes"] == {"micro": 2, "policy": "matmul"}
    assert (found["held"], found["held_as_asked"], found["ratio"]) == (90, 200, 2.0)
    assert peaks.changed(asked, found["changes"]) == replace(asked, micro=2, rule=replace(asked.rule, policy="matmul"))
    assert peaks.bring_under(asked, asked, 100, ("policy",))["changes"] == {"micro": 2}
    nowhere = peaks.bring_under(asked, asked, 40, ())
    assert (nowhere["reached"], nowhere["held"]) == (False, 50)


def test_blocks_that_were_joined_come_apart_last():
    asked = TrainOptions(blocks=2)
    ways = peaks.ways_of(asked)
    assert ways[0] == [asked]
    assert [way.blocks for (way,) in ways[1:4]] == [4, 8, 16]
    assert ways[-1][0].blocks is None
    assert [way.rule.group for (way,) in peaks.ways_of(read_rules(["sll:group=5"], TrainOptions())["sll:group=5"])] == [
        5,
        2,
        1,
    ]
    assert peaks.changed(asked, peaks.changes(asked, ways[-1][0])) == ways[-1][0]


def test_a_row_that_was_not_timed_has_no_path():
    assert path_of({"held": 1, "held_as_asked": 2}) == []


def test_energy_is_that_of_whole_processors_and_counters_wrap(tmp_path):
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    counters = domains(tmp_path)
    meter = EnergyMeter(counters)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("300\n")
    assert meter.joules() == pytest.approx((150 + 200) / 1e6)
    assert domains(tmp_path / "nothing") == []
