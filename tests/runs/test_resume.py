"""A run that was stopped at any step and resumed ends with the same bits as one that was not stopped."""

import random
import re
import signal
import time

import pytest
import torch
from support.runs import SMALL, TIMING, lines, result, split, start, state, train, weights

from layerwise import Learner
from layerwise.cli.main import main

HARD = split("--steps 23 --batch-size 128 --save-every 4 --log-every 3 --accumulate 3 --epochs 3")
NETS = {
    "mlp": split("--model mlp --model.dropout 0.2 --model.norm batch"),
    "vgg": split("--model vgg --model.width 4 --model.dropout 0.2 --augment flip crop cutout --mixup 0.4 --cutmix 1"),
}


class Killed(BaseException):
    """Stands for a crash: nothing in the library handles it."""


@pytest.fixture
def at_step(monkeypatch):
    """A function that calls something when a step is about to run; None calls nothing."""
    real = Learner.step

    def arrange(step, action):
        def stepping(self, x, y):
            if self.steps == step:
                action()
            return real(self, x, y)

        monkeypatch.setattr(Learner, "step", stepping)

    return arrange


def kill():
    raise Killed


def stop_at(at_step, step, run):
    at_step(step, kill)
    with pytest.raises(Killed):
        run()
    at_step(None, kill)


def resume(folder):
    assert main(["train", "--resume", str(folder)]) == 0


def tree_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tree_equal(a[key], b[key]) for key in a)
    return a == b


def assert_same_run(a, b, notes=True):
    assert tree_equal(weights(a), weights(b))
    assert tree_equal(state(a), state(b))
    assert lines(a) == lines(b)
    left_out = {*TIMING, "command", "options"} | (set() if notes else {"notes"})
    of_a, of_b = ({k: v for k, v in result(run).items() if k not in left_out} for run in (a, b))
    assert of_a == of_b


@pytest.mark.parametrize("net", ["mlp", pytest.param("vgg", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["sll", pytest.param("local_ce", marks=pytest.mark.slow), "backprop"])
def test_stopped_at_any_step(tmp_path, at_step, rule, net):
    words = [*HARD, "--rule", rule, *NETS[net]]
    whole = train(tmp_path / "whole", *words)
    steps = sorted(random.Random(f"{rule} {net}").sample(range(1, 23), 3))
    stop_at(at_step, steps[0], lambda: train(tmp_path / "run", *words))
    for step in steps[1:]:
        stop_at(at_step, step, lambda: resume(tmp_path / "run"))
    resume(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_before_the_first_checkpoint(tmp_path, at_step, step):
    whole = train(tmp_path / "whole", *HARD)
    stop_at(at_step, step, lambda: train(tmp_path / "run", *HARD))
    assert not (tmp_path / "run" / "checkpoints").exists()
    resume(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run", notes=False)
    assert any("started again at step 0" in note for note in result(tmp_path / "run")["notes"])


def test_options_of_every_kind_survive(tmp_path, at_step):
    words = [
        *split("--steps 8 --epochs 2 --save-every 3 --precision bf16 --clip 0.5 --label-smoothing 0.1 --blocks 1"),
        *split("--optimizer sgd --optimizer-options momentum 0.8 --lr-multipliers head 0.5 --channels-last"),
        *split("--rule.weight 0.1 0.9 --rule.dropout 0.3 --schedule cosine --nonfinite skip --val-fraction 0"),
    ]
    whole = train(tmp_path / "whole", *words)
    stop_at(at_step, 5, lambda: train(tmp_path / "run", *words))
    resume(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_torn_checkpoint_is_passed_over(tmp_path, at_step):
    whole = train(tmp_path / "whole", *HARD)
    stop_at(at_step, 14, lambda: train(tmp_path / "run", *HARD))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == "step-000000012"
    torn = newest / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    resume(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run", notes=False)
    extra = [note for note in result(tmp_path / "run")["notes"] if note not in result(whole)["notes"]]
    assert ["step-000000012 is damaged" in note for note in extra] == [True]


def test_a_half_written_line_is_dropped(tmp_path, at_step):
    whole = train(tmp_path / "whole", *HARD)
    stop_at(at_step, 14, lambda: train(tmp_path / "run", *HARD))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "spl')
    resume(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_stopped_after_the_last_checkpoint(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", *HARD)
    with monkeypatch.context() as patch:
        patch.setattr("layerwise.runs.training.Run._finish", lambda self, log: kill())
        with pytest.raises(Killed):
            train(tmp_path / "run", *HARD)
    resume(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing_and_says_so(tmp_path, capsys):
    folder = train(tmp_path / "run", *HARD)
    before = (weights(folder), state(folder), lines(folder), result(folder))
    capsys.readouterr()
    resume(folder)
    assert capsys.readouterr().err.splitlines()[0].endswith(" · finished already")
    after = (weights(folder), state(folder), lines(folder), {**result(folder), "command": before[3]["command"]})
    assert all(map(tree_equal, before[:2], after[:2]))
    assert before[2:] == after[2:]


def test_other_threads_are_noted(tmp_path, at_step, monkeypatch):
    stop_at(at_step, 14, lambda: train(tmp_path / "run", *HARD))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    resume(tmp_path / "run")
    assert any("2 threads instead of 1" in note for note in result(tmp_path / "run")["notes"])


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_is_answered_at_the_end_of_the_step(tmp_path, at_step, capsys, signum):
    whole = train(tmp_path / "whole", *HARD)
    before = signal.getsignal(signum)
    at_step(10, lambda: signal.raise_signal(signum))
    assert main(["train", *SMALL, *HARD, "--out", str(tmp_path / "a b")]) == 128 + signum
    assert signal.getsignal(signum) is before
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by {signum.name} after step 11 of 23" in last
    assert f"layerwise train --resume '{tmp_path / 'a b'}'" in last
    at_step(None, kill)
    resume(tmp_path / "a b")
    assert_same_run(whole, tmp_path / "a b")


def test_a_second_signal_acts_at_once(tmp_path, at_step, capsys):
    def twice():
        first = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is first:  # Python calls a handler soon, not always before the next line
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    at_step(10, twice)
    words = ["train", *SMALL, *HARD, "--out", str(tmp_path / "run")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(words) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == "step-000000008"
    assert capsys.readouterr().err.endswith("layerwise: stopped.\n")


# In processes of their own

LONG = split("--steps 250 --epochs 25 --batch-size 128 --save-every 7 --log-every 1")


def signalled(process, signum, folder, count):
    """Send a signal when the run has logged so many lines; returns exit code and stderr."""
    file, deadline = folder / "metrics.jsonl", time.monotonic() + 60

    def logged():
        return file.read_bytes().count(b"\n") if file.exists() else 0

    # One more than the process before has left: what stands there tells nothing of this one.
    count = max(count, logged() + 1)
    while time.monotonic() < deadline and process.poll() is None:
        if logged() >= count:
            break
        time.sleep(0.002)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.slow
def test_stopped_from_outside_again_and_again(tmp_path):
    whole, folder = train(tmp_path / "whole", *LONG), tmp_path / "run"
    words = ["train", *SMALL, *LONG, "--out", folder]
    signals = random.sample([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], 2)
    for signum, count in zip(signals, sorted(random.sample(range(2, 100), len(signals))), strict=True):
        code, err = signalled(start(*words), signum, folder, count)
        if signum == signal.SIGKILL:
            assert code == -signum, err
        else:
            assert code == 128 + signum, err
            told = re.search(rf"stopped by {signum.name} after step (\d+) of 250; continue with: layerwise train", err)
            assert told, err
            assert (folder / "checkpoints" / f"step-{int(told[1]):09d}").is_dir()
        assert "Traceback" not in err
        words = ["train", "--resume", folder]
    assert not (folder / "result.json").exists()
    resume(folder)
    assert_same_run(whole, folder)
