"""`layerwise doctor` reports what is installed, and names what prevents a run."""

import json
import re
import shutil
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from layerwise import __version__, rules
from layerwise.cli import doctor
from layerwise.cli.main import main
from layerwise.parsing import ELSEWHERE
from layerwise.runs.settings import FLAGS, RunSettings


def facts(capsys, code=0):
    assert main(["doctor", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def with_cuda(patch, driver):
    """A torch that is built for CUDA, on a machine with or without a driver."""
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(shutil, "which", lambda name: driver)


def test_a_torch_built_for_cuda_trains_without_a_gpu_too(capsys, monkeypatch):
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)
    with_cuda(monkeypatch, None)
    assert facts(capsys)["problems"] == []


def test_it_names_versions_and_finds_nothing_wrong_here(capsys, monkeypatch):
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)
    found = facts(capsys)
    assert found["layerwise"].startswith(__version__)
    assert found["torch"].startswith(torch.__version__)
    assert found["problems"] == []
    assert main(["doctor"]) == 0
    assert "nothing stands in the way" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (lambda patch: patch.setenv("LAYERWISE_DATA", "/no/such"), "names /no/such, which is not a folder"),
        (lambda patch: patch.setattr(torch, "__version__", "2.5.1"), "torch 2.5.1 is too old"),
        (lambda patch: patch.setattr(torch, "get_num_threads", lambda: 10**4), "set OMP_NUM_THREADS="),
        (lambda patch: with_cuda(patch, "/usr/bin/nvidia-smi"), "torch is built for CUDA and finds no GPU"),
    ],
)
def test_what_stands_in_the_way_is_said_with_its_remedy(breaks, sentence, capsys, monkeypatch):
    if "GPU" in sentence and torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    breaks(monkeypatch)
    assert any(sentence in problem for problem in facts(capsys, code=1)["problems"])


def test_the_data_folder_is_listed(capsys, monkeypatch, tmp_path):
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    assert facts(capsys)["data folder"] == f"{tmp_path}: cifar10"


def test_a_missing_part_has_its_command(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", lambda name: ['matplotlib>=3.8; extra == "report"', "torch>=2.6"])
    monkeypatch.setattr(doctor, "version", absent)
    assert doctor.parts() == {"report": "without matplotlib: pip install 'layerwise[report]'"}


def test_wrong_use_is_one_sentence(capsys):
    assert main(["doctor", "--fast"]) == 2
    assert re.fullmatch(r"layerwise: doctor takes no '--fast'.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("what", ["rules", "models", "data", "recipes"])
def test_lists_are_there_for_programs(what, capsys):
    assert main(["ls", what]) == 0
    plain = capsys.readouterr().out
    assert main(["ls", what, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found] == [line.split("  ")[0].strip() for line in plain.splitlines()]
    if what == "rules":
        own = {name: {"locality": rules.get(name).locality, "about": found[name]["about"]} for name in rules.names()}
        assert own == {name: found[name] for name in rules.names()}
        assert not [name for name in own if own[name]["about"].startswith(own[name]["locality"])]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--learning-rate 1", "--lr"),
        ("--bs 4", "--batch-size"),
        ("--gpu 1", "--device cuda"),
        ("--depth 3", "--model.depth"),
    ],
)
def test_names_of_other_programs_are_answered_with_ours(words, name, capsys):
    assert main(["train", *words.split()]) == 2
    assert f"here it is {name};" in capsys.readouterr().err


def test_names_of_other_programs_are_no_options_of_ours():
    own = {f"--{FLAGS.get(name, name).replace('_', '-')}" for name in RunSettings.__dataclass_fields__}
    assert not own & {*ELSEWHERE}
    assert {word.split()[0] for word in ELSEWHERE.values()} <= own | {
        *("--rule", "--model", "--model.depth", "--model.width", "--jobs")
    }
