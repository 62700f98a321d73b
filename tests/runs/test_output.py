"""The output file that a user names is replaced, and no other file."""

import os
import stat
import threading

import pytest
from support.runs import train

from layerwise import LayerwiseError
from layerwise.cli.main import main
from layerwise.runs.output import check_output, write_output


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
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_not_to_be_replaced_is_refused(line, made, capsys):
    names = {"RUN": "run", "T": "t.csv", "LINK": "link.csv", "HARD": "hard.csv", "INTO": "into", "FIFO": "fifo"}
    names |= {"SOCKET": "socket", "OTHER": "other.csv"}
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
