"""A comparison and a run say what they are doing, also where there is no bar."""

from layerwise.errors import quiet
from layerwise.runs import progress


def test_no_part_of_a_comparison_waits_without_a_word(comparison):
    """Every kind of task says what it is and how many are left, also before the first run and after the last."""
    lines = (comparison.parent / "stderr").read_text().splitlines()
    for title, tasks in (("a step of each rule", 3), ("memory of a step at other", 3), ("diagnostics of the runs", 6)):
        at = next(i for i, line in enumerate(lines) if line.startswith(title))
        counted = lines[at + 1 : at + 1 + tasks]
        assert [line.split(" · ")[1] for line in counted] == [f"{i + 1} of {tasks}" for i in range(tasks)]
        assert all(line.endswith(" left") for line in counted)
    assert lines[-1] == "drawing the report"


def test_a_long_epoch_is_not_silent_where_there_is_no_bar(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.Progress(100, 100, "run") as shown:
        for step in range(1, 6):
            now[0] += 9.0
            shown.show(step, {"head/loss": 2.0}, 8.0)
        shown.epoch(5, {"head/accuracy": 0.5}, 8.0, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # the title, a line after 27 s, and the end of the epoch; 18 s later it is too early
    assert lines[1] == "epoch 0.0 · loss 2.000 · 8 samples/s · 14:33 left"  # 97 steps of 9 s


def test_quiet_leaves_out_what_is_being_done(capsys):
    with progress.working("drawing"):
        pass
    assert capsys.readouterr().err == "drawing\n"
    token = quiet.set(True)
    with progress.working("drawing"):
        pass
    quiet.reset(token)
    assert capsys.readouterr().err == ""
