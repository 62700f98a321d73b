"""The output file that a user names is replaced, and no other file."""

import io
import os
import stat
import threading

import pytest
import torch
from safetensors.torch import load
from support.runs import train

from layerwise import LayerwiseError, replace
from layerwise.cli.main import Output, main
from layerwise.runs.building import load_run
from layerwise.runs.output import check_output, write_output
from layerwise.runs.writing import write_atomically


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a table and a run on it."""
    base = tmp_path_factory.mktemp("made")
    (base / "t.csv").write_text("a,b,label\n" + "".join(f"{i},{i * i % 7},{i % 2}\n" for i in range(40)))
    words = ["--data", str(base / "t.csv"), "--model.width", "8", "--steps", "1", "--batch-size", "8"]
    train(base / "run", *words, "--val-fraction", "0")
    return base


def contents(folder):
    """Every file with its bytes, and every other node with its kind."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else stat.S_IFMT(path.lstat().st_mode)
        for path in folder.rglob("*")
    }


REFUSED = {
    "predict RUN T --out T": "the command reads it",
    "predict RUN T --out LINK": "the command reads it",
    "predict RUN OTHER --out T": "the command reads it",  # the run was trained on it
    "eval RUN --json=HARD": "the command reads it",
    "export RUN T": "the command reads it",
    "export RUN RUN/config.json": "the folder of a run",
    "export RUN RUN/new.safetensors": "the folder of a run",
    "eval RUN --json RUN/config.json": "the folder of a run",
    "eval RUN --json=INTO": "the folder of a run",
    "predict RUN T --out RUN/checkpoints/x.csv": "the folder of a run",
    "bench memory --json RUN/result.json": "the folder of a run",
    "beliefs RUN --json RUN/config.json": "the folder of a run",
    "beliefs RUN --plot RUN/a.svg": "the folder of a run",
    "predict RUN T --out FIFO": "FIFO|could not write",
    "export RUN FIFO": "could not write",
    "eval RUN --json=FIFO": "could not write",
    "bench speed --json=SOCKET": "it is a socket|could not write",
    "export RUN RUN": "it is a folder",
    "export RUN ONNX": "would be a safetensors file, in spite of its name",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_not_to_be_replaced_is_refused(line, made, capsys):
    names = {"RUN": "run", "T": "t.csv", "LINK": "link.csv", "HARD": "hard.csv", "INTO": "into", "FIFO": "fifo"}
    names |= {"SOCKET": "socket", "OTHER": "other.csv", "ONNX": "new.onnx"}
    nodes = {"link.csv": ("symlink", "t.csv"), "hard.csv": ("link", "t.csv"), "into": ("symlink", "run/config.json")}
    for name, (how, target) in nodes.items():
        if not os.path.lexists(made / name):
            getattr(os, how)(made / target, made / name)
    if not (made / "fifo").exists():
        os.mkfifo(made / "fifo")
        os.mknod(made / "socket", stat.S_IFSOCK | 0o600)
        (made / "other.csv").write_bytes((made / "t.csv").read_bytes())
    words = []
    for word in line.split():
        option, equals, name = word.rpartition("=")
        first, slash, rest = name.partition("/")
        words.append(f"{option}{equals}{made / names[first]}{slash}{rest}" if first in names else word)
    before = contents(made)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and any(part in err for part in REFUSED[line].split("|")), err
    assert contents(made) == before


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    (tmp_path / "dangling").symlink_to("there/new")
    for name, target in (("link", "file"), ("dangling", "new")):
        write_output(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / target).read_text() == "new"
    assert len(list(tmp_path.rglob("*"))) == 5


def test_nothing_else_is_deleted_and_the_rights_stay(tmp_path):
    (tmp_path / "o.csv.partial").write_text("mine")
    (tmp_path / "o.csv").write_text("old")
    (tmp_path / "o.csv").chmod(0o640)
    write_output(tmp_path / "o.csv", "new")
    assert contents(tmp_path) == {"o.csv.partial": b"mine", "o.csv": b"new"}
    assert stat.S_IMODE((tmp_path / "o.csv").stat().st_mode) == 0o640


def test_a_pipe_that_is_read_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    got = []
    thread = threading.Thread(target=lambda: got.extend(iter(lambda: os.read(reader, 4096), b"")))
    writer = threading.Thread(target=write_output, args=(tmp_path / "pipe", "x" * 300_000))
    writer.start()
    writer.join(0.05)  # it fills the pipe before anyone reads
    thread.start()
    writer.join(10)
    thread.join(10)
    os.close(reader)
    assert b"".join(got) == b"x" * 300_000
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_failure_leaves_no_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "o").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LayerwiseError, match="No space left"):
        write_output(tmp_path / "o", "new")
    assert contents(tmp_path) == {"o": b"old"}


@pytest.mark.parametrize("name", ["no/such/folder", "n" * 300, "a\0b", "circle"])
def test_a_name_that_no_file_can_have_is_refused(name, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(LayerwiseError, match="could not write") as caught:
        check_output(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_image_of_the_input_is_not_replaced_and_a_table_beside_it_is(tmp_path):
    (tmp_path / "a.png").write_text("image")
    (tmp_path / "predicted.csv").write_text("old")
    with pytest.raises(LayerwiseError, match="the command reads it"):
        write_output(tmp_path / "a.png", "new", [tmp_path])
    write_output(tmp_path / "predicted.csv", "new", [tmp_path])
    assert contents(tmp_path) == {"a.png": b"image", "predicted.csv": b"new"}


def test_an_export_says_which_replacements_its_weights_need(made, capsys):
    """Under `binary` the network without it predicts something else with the same weights."""
    words = ["--data", str(made / "t.csv"), "--model.width", "8", "--steps", "1", "--batch-size", "8"]
    train(made / "binary", *words, "--replace", "mask_relu", "binary")
    capsys.readouterr()
    assert main(["export", str(made / "binary"), str(made / "w.safetensors")]) == 0
    assert "layerwise.replace(model, ['binary']) before" in capsys.readouterr().err
    run = load_run(made / "binary")
    model = replace(run.options.model.build(run.facts.shape, 2), ["binary"])
    model.load_state_dict(load((made / "w.safetensors").read_bytes()))
    x = torch.randn(4, *run.facts.shape)
    torch.testing.assert_close(model.eval()(x), run.learner(x))


def test_nothing_follows_weights_that_are_exported_to_standard_output(made, capfdbinary):
    capfdbinary.readouterr()
    assert main(["export", str(made / "run"), "/dev/stdout"]) == 0
    assert load(capfdbinary.readouterr().out).keys() == load_run(made / "run").learner.state_dict()["model"].keys()


def test_names_that_are_not_utf8_are_written_as_they_are(tmp_path):
    name = os.fsdecode(b"\xff.png")
    write_output(tmp_path / "out.csv", name)
    write_atomically(tmp_path / "file", name)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "file").read_bytes() == b"\xff.png"
    printed = io.BytesIO()
    stream = io.TextIOWrapper(printed, encoding="utf-8", write_through=True)
    Output(stream).write(name)
    assert printed.getvalue() == b"\xff.png"
