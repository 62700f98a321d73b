"""Opening what a user named: a regular file, or one sentence at once."""

import os
import socket

import pytest

from layerwise import LayerwiseError, files
from layerwise.files import UnreadableFile, open_to_append

OPENERS = [files.check_regular, files.open_regular, files.read_bytes, files.read_text]


@pytest.mark.parametrize("opener", OPENERS)
def test_what_is_no_regular_file_is_refused_at_once(opener, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for name, words in {
            "pipe": "is a named pipe, not a file; do this",
            "link": "is a named pipe, not a file; do this",
            "folder": "is a folder, not a file; do this",
            "socket": "is a socket, not a file; do this",
            "dangling": "there is no file .*dangling; do this",
            "nothing/at/all": "there is no file .*nothing/at/all; do this",
            "circle": "circle cannot be read .*; do this",
            "x" * 300: "cannot be read .*; do this",
            "a\0b": "cannot be read .*; do this",
            "\ud800": "cannot be read .*; do this|there is no file .*; do this",
        }.items():
            with pytest.raises(LayerwiseError, match=words) as caught:
                opener(tmp_path / name, "do this")
            assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    with pytest.raises(LayerwiseError, match="is a device, not a file"):
        opener("/dev/zero")


def test_nothing_is_a_missing_file_and_no_other_error(tmp_path):
    with pytest.raises(files.MissingFile):
        files.open_regular(tmp_path / "nothing")
    with pytest.raises(files.UnreadableFile) as caught:
        files.open_regular(tmp_path)
    assert not isinstance(caught.value, files.MissingFile)


def test_links_do_not_lead_out_of_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"in")
    (tmp_path / "out").write_bytes(b"out")
    (tmp_path / "in" / "near").symlink_to("file")
    (tmp_path / "in" / "far").symlink_to("../out")
    inside = tmp_path / "in"
    assert files.read_bytes(inside / "near", inside=inside) == b"in"
    for path in (inside / "far", inside / ".." / "out", tmp_path / "out"):
        with pytest.raises(LayerwiseError, match="outside the folder"):
            files.read_bytes(path, inside=inside)
        assert files.read_bytes(path) == b"out"


def test_a_file_without_the_right_to_read_and_one_too_large(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(LayerwiseError, match="has 5 bytes, more than the 4"):
        files.read_bytes(tmp_path / "file", limit=4)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(LayerwiseError, match="cannot be read \\(Permission denied\\)"):
        files.open_regular(tmp_path / "file")


def test_text_with_and_without_a_mark(tmp_path):
    for content in ("é\nb".encode(), "\ufeffé\r\nb".encode()):
        (tmp_path / "t").write_bytes(content)
        assert files.read_text(tmp_path / "t") == "é\nb"
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    with pytest.raises(LayerwiseError, match="not UTF-8"):
        files.read_text(tmp_path / "t")


def test_a_list_of_files_has_neither_hidden_ones_nor_those_of_a_mac(tmp_path):
    for name in ("b/2.PNG", "a.png", "b/1.png", "b/n.txt", "._a.png", ".x/a.png", "__MACOSX/b/._1.png", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    assert files.list_files(tmp_path, (".png",)) == [tmp_path / n for n in ("a.png", "b/1.png", "b/2.PNG")]
    assert tmp_path / "b/n.txt" in files.list_files(tmp_path)
    assert files.list_folders(tmp_path) == [tmp_path / "b"]
    with pytest.raises(LayerwiseError, match="is not a folder"):
        files.list_files(tmp_path / "a.png")


def test_a_folder_that_may_not_be_read_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(LayerwiseError, match="secret cannot be read \\(Permission denied\\)"):
        files.list_files(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_but_a_file_is_written_at_its_end(tmp_path, kind):
    place, elsewhere = tmp_path / "log", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    {"link": lambda: place.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    with pytest.raises(UnreadableFile, match=r"log is a .*; remove it"):
        open_to_append(place, "remove it")
    assert elsewhere.read_text() == "mine"


def test_a_file_is_written_at_its_end(tmp_path):
    for line in ("one\n", "two\n"):
        with open_to_append(tmp_path / "log") as log:
            log.write(line)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    with pytest.raises(FileNotFoundError):
        open_to_append(tmp_path / "absent" / "log")
