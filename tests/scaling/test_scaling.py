"""`layerwise bench scaling`: what it measures, and closed forms for its simulator."""

import json
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import split, start

from layerwise import LayerwiseError
from layerwise.cli.main import main
from layerwise.measure.bench_problem import network_of
from layerwise.scaling import bench as scaling
from layerwise.scaling.bench import contention
from layerwise.scaling.counting import CountingLink
from layerwise.scaling.jobs import RankProcesses
from layerwise.scaling.options import ScalingOptions
from layerwise.scaling.simulate import (
    PARTS,
    Costs,
    Interconnect,
    Op,
    actions,
    forward_only,
    grown,
    period,
    predicted,
    scheduled,
    simulate,
)

TINY = split("bench scaling --model mlp --depth 4 --model.width 16 --shape 1 8 8 --batch-size 16 --timeout 60")
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "optimizer": 0.0}


def steady(programs, skip=20, **machine):
    """Seconds per batch at the last rank."""
    return period(simulate(programs, **machine), [op.name for op in programs[-1]], skip)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_equal_stages_give_a_batch_per_stage_time(ranks):
    programs = forward_only([3.0] * ranks, 60)
    assert steady(programs) == pytest.approx(3.0)
    spans = simulate(programs, Interconnect(latency=0.25), None)
    # The first batch comes through with all it costs; it is made of three messages, each known to have arrived.
    assert spans[ranks - 1, 0][1] == pytest.approx(3.0 * ranks + (ranks - 1) * 5 * 0.25)


def test_the_slowest_stage_or_the_wire_sets_the_pace():
    assert steady(forward_only([1.0, 4.0, 2.0], 60)) == pytest.approx(4.0)
    assert steady(forward_only([1.0, 1.0], 60, size=12.0), interconnect=Interconnect(bandwidth=4.0)) == pytest.approx(
        3.0
    )
    # A lane has a batch under way, of three messages that each wait for a word about the one before.
    assert steady(forward_only([1.0, 1.0], 60, lanes=1), interconnect=Interconnect(latency=2.0)) == pytest.approx(
        2 * 3 * 2.0
    )
    assert steady(
        forward_only([1.0, 1.0], 200, lanes=4, queue=100), interconnect=Interconnect(latency=2.0)
    ) == pytest.approx(3.0)


@pytest.mark.parametrize("queue", [1, 2, 5])
def test_a_rank_is_no_more_batches_ahead_than_the_queue_holds(queue):
    spans = simulate(forward_only([1.0, 10.0], 30, queue=queue))
    for step in range(queue + 1, 30):
        assert spans[0, step][0] >= spans[1, step - queue - 1][0]
    # It waits for nothing else.
    assert spans[0, 20][0] == spans[1, 19 - queue][0]
    # Where the word that there is room takes long, the queue sets the pace.
    programs = forward_only([1.0, 1.0], 200, queue=queue, lanes=1000, trips=1)
    assert steady(programs, 100, interconnect=Interconnect(latency=20.0)) == pytest.approx(
        (1.0 + 2 * 20.0) / (queue + 1), rel=0.05
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (4, 4), (3, 9)])
def test_the_bubble_is_as_in_the_textbook(schedule, ranks, micro):
    spans = simulate(scheduled(actions(schedule, ranks, micro), [COSTS] * ranks, 1))
    whole = max(end for _, end in spans.values())
    assert whole == pytest.approx((micro + ranks - 1) * 3.0)
    assert 1 - micro * 3.0 / whole == pytest.approx((ranks - 1) / (micro + ranks - 1))


def test_a_zero_bubble_schedule_lies_between_1f1b_and_no_bubble():
    for schedule in ("zb1p", "zbv"):
        share = 1 / PARTS[schedule]
        costs = {name: share * seconds for name, seconds in COSTS.items()}
        programs = scheduled(actions(schedule, 4, 8), [costs] * (4 * PARTS[schedule]), 1)
        assert 8 * 3.0 < max(end for _, end in simulate(programs).values()) < (8 + 3) * 3.0


@pytest.mark.parametrize("schedule", PARTS)
def test_a_schedule_does_everything_once(schedule):
    found = [action for order in actions(schedule, 4, 8) for action in order]
    kinds = ("F", "I", "W") if schedule.startswith("zb") else ("F", "B")
    parts = range(4 * PARTS[schedule])
    assert sorted(found) == sorted((kind, part, micro) for kind in kinds for part in parts for micro in range(8))


def test_ranks_share_cores():
    # One core for two ranks: the pace is what both cost.
    programs, half = forward_only([1.0, 3.0], 100), {"speed": lambda running: 1 / running}
    assert period(simulate(programs, **half), [(1, step) for step in range(60)], 20) == pytest.approx(4.0)
    costs = Costs([1.0, 3.0], *[[1.0] * 2] * 4, micro_batches=1)
    assert predicted("pipeline", 2, costs, [1, 1], 0.0, 1, **half) == pytest.approx(4.0)


def test_gloo_sends_what_is_asked_for():
    late = [Op("before", 5.0), Op("b", 1.0, needs=("a",))]
    spans = simulate(
        [[Op("a", 1.0, to=(1,), asked=True), Op("c", 1.0, needs=(("sent", "a"),))], late], Interconnect(2.0)
    )
    assert spans["b"] == (5.0 + 2.0 + 2.0, 10.0)  # the question, the answer
    assert spans["c"][0] == 7.0  # a has gone when the question has come


def test_programs_that_wait_for_one_another_are_refused():
    with pytest.raises(ValueError, match="rank 0 waits for ever at a"):
        simulate([[Op("a", 1.0, ("b",), (1,))], [Op("b", 1.0, ("a",), (0,))]])


def test_a_prediction_is_the_sum_of_its_blocks():
    costs = Costs([4.0] * 4, [1.0] * 4, [2.0] * 4, [1.0] * 4, [0.5] * 4, micro_batches=4)
    flops = [1, 1, 1, 1]
    assert predicted("pipeline", 2, costs, flops, 0.0, 4) == pytest.approx(8.0)
    assert predicted("pipeline", 1, costs, flops, 0.0, 4) == pytest.approx(16.0)
    assert predicted("gpipe", 2, costs, flops, 0.0, 4) == pytest.approx((4 + 2 - 1) * 2 * 3.0 + 2 * 0.5)
    # Twice as many micro-batches of half the size.
    assert predicted("1f1b", 2, costs, flops, 0.0, 8) == pytest.approx((8 + 2 - 1) * 3.0 + 2 * 0.5)
    assert costs.backprop() == 4 * 4 * 3.0 + 4 * 0.5
    assert grown([1.0, 2.0, 3.0, 4.0, 9.0], 6) == [1.0, *[3.0] * 5, 9.0]


@pytest.mark.slow
def test_all_ways_are_measured_and_simulated(tmp_path, capsys, monkeypatch):
    costs = []
    monkeypatch.setattr(scaling, "Costs", lambda **found: costs.append(Costs(**found)) or costs[-1])
    file, folder = tmp_path / "figures.json", tmp_path / "out"
    words = [*TINY, *split("--ranks 1,2 --rounds 1 --steps 2 --warmup 1 --simulate 4 --json"), str(file)]
    assert main([*words, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(file.read_text())
    measured = {(row["way"], row["ranks"]): row for row in rows if "samples_per_second" in row}
    several = ("apart", "pipeline", "data", "ddp", "gpipe", "1f1b", "zb1p", "zbv")
    assert set(measured) == {("rule", 1), ("backprop", 1), ("pipeline", 1), *((way, 2) for way in several)}
    assert measured["rule", 1]["ratio"] == 1
    for (_, ranks), row in measured.items():
        assert row["samples_per_second"] > 0
        assert row["fill"] > 0
        for parts in zip(row["busy"], row["queued"], row["waiting"], strict=True):
            assert sum(parts) == pytest.approx(1, abs=0.05)
        assert len(row["waiting"]) == len(row["bytes_per_step"]) == ranks
        assert (row["predicted"] is None) == (row["way"] not in ("pipeline", *PARTS))
    # An activation of 16 floats per sample; ours sends a belief over 10 classes with it, and nothing back.
    activation = 16 * 16 * 4
    sent = {way: measured[way, 2]["bytes_per_step"] for way in several}
    assert sent["pipeline"] == [activation + 16 * 10 * 4, 0]
    assert sent["gpipe"] == sent["1f1b"] == sent["zb1p"] == [activation, activation]
    assert sent["zbv"] == [2 * activation] * 2
    network = network_of("mlp", 4, (1, 8, 8), {"width": 16})
    assert sent["data"] == sent["ddp"] == [sum(p.nbytes for p in network.parameters())] * 2  # sll's readouts are fixed
    assert (measured["data", 2]["rule"], measured["ddp", 2]["rule"]) == ("sll", "backprop")
    grown_rows = [row for row in rows if "speedup" in row]
    assert {row["ranks"] for row in grown_rows} == {2, 4}
    assert all(0 < row["speedup"] < row["ranks"] * 1.001 for row in grown_rows)
    # A figure per block and head, also where the head learns with the last block.
    (cost,) = costs
    assert [len(row) for row in (cost.rule, cost.forward, cost.backward, cost.input, cost.optimizer)] == [5] * 5
    assert min(cost.rule[:4]) > 0 == cost.rule[4]
    assert "pipeline of 2 ranks: " in out
    assert json.loads((folder / "scaling.json").read_text())["rows"] == rows
    assert "Throughput on several processes" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_every_way_moves_weights_as_one_process_does_and_a_process_that_dies_is_told(tmp_path):
    options = ScalingOptions(
        model="mlp", depth=4, model_options={"width": 16}, shape=(1, 8, 8), batch_size=16, optimizer="sgd", timeout=30
    )
    log = tmp_path / "log.txt"
    one, two = RankProcesses(1, options, log), RankProcesses(2, options, log)
    try:
        one.meet()
        two.meet()
        network = network_of("mlp", 4, (1, 8, 8), {"width": 16})
        before = {name: parameter.detach().flatten() for name, parameter in network.named_parameters()}

        def moved(processes, way):
            processes.ask([{"do": "measure", "way": way, "warmup": 1, "steps": 1}] * processes.ranks)
            found = processes.ask([{"do": "weights", "way": way}] * processes.ranks)
            # A rank leaves the blocks of the others as they were.
            return {name: sum(p.new_tensor(f[name]) - p for f in found) for name, p in before.items()}

        wanted = moved(one, "backprop")
        for way in PARTS:
            for name, change in moved(two, way).items():
                error = (change - wanted[name]).norm() / wanted[name].norm()
                assert error < 1e-2, (way, name, error)  # single precision, of weights that moved by 1e-4

        def shared(way):
            two.ask([{"do": "measure", "way": way, "warmup": 1, "steps": 1}] * 2)
            first, second = two.ask([{"do": "weights", "way": way}] * 2)
            assert first == second
            return first

        one.ask([{"do": "measure", "way": "rule", "warmup": 1, "steps": 1}])
        for way, alone in (("data", "sll"), ("ddp", "backprop")):
            found, whole = shared(way), one.ask([{"do": "weights", "way": alone}])[0]
            for name, start in before.items():
                change = start.new_tensor(whole[name]) - start
                assert (start.new_tensor(found[name]) - start - change).norm() < 1e-2 * change.norm()
        two.processes[1].kill()
        with pytest.raises(LayerwiseError, match=r"process \d of 2 failed"):
            two.ask([{"do": "measure", "way": "gpipe", "warmup": 1, "steps": 1}] * 2)
    finally:
        one.close()
        two.close()


def test_at_the_end_of_a_way_every_lane_has_given_its_last_word():
    link = CountingLink(SimpleNamespace(rank=0, count=1, transfer_device=None, lanes=4))
    link.from_previous = channel = SimpleNamespace(lanes=range(4), found=deque(["batch"] * 6 + [None] * 4))
    channel.receive = channel.found.popleft
    while link.take():
        assert link.receive() == "batch"
    link.close()
    assert not channel.found


@pytest.mark.slow
def test_nobody_outlives_the_command():
    process = start(*TINY, *split("--ranks 1,2 --rounds 100000 --ways rule pipeline"))
    try:
        assert "100000 rounds" in process.stderr.readline()
        started, children = time.monotonic(), []
        while len(children) < 3 and time.monotonic() < started + 60:
            time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 3
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in children):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return False


def test_contention_is_that_of_processes_that_share_nothing():
    class Found:
        def __init__(self, rate):
            self.rates = [rate]

    speed = contention({("rule", 1): Found(10.0), ("apart", 2): Found(19.0), ("apart", 4): Found(21.0)})
    assert [speed(k) for k in (1, 2, 3, 4, 8)] == pytest.approx([1.0, 0.95, 20 / 30, 21 / 40, 21 / 80])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--bandwidth 1e-320", "bandwidth is 1e-320 Gbit/s; use more than 0"),
        ("--latency 1e308", "latency is 1e+308 ms; use 1e+09 at most"),
        ("--simulate 1000000000", "simulate is 1000000000; give a number of ranks from 2 to 1024"),
        ("--hosts='a", "which is not a command (No closing quotation)"),
        ("--hosts=a\0b", "embedded null byte); correct --hosts"),
        ("--hosts=no_such_program", "cannot start no_such_program"),
        ("--hosts=echo", "a command in --hosts must print nothing itself"),
    ],
)
def test_nonsense_is_one_sentence_before_anything_is_measured(words, sentence, capsys):
    small = "--model mlp --depth 3 --model.width 8 --shape 1 8 8 --batch-size 8 --ranks 1 --ways rule pipeline"
    assert main(["bench", "scaling", *small.split(), *words.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("layerwise: ") and sentence in last and "unexpected" not in last
