"""The examples of `docs/frameworks.md` run, and print what the page says, numbers aside."""

import re
import runpy
import subprocess
import sys

import pytest
from support.pages import ROOT

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
SHOWN = {name: text for name, text in re.findall(r"examples/(\w+)\.py`[^`]*```text\n(.*?)```", PAGE, re.DOTALL)}
NEEDS = {
    "accelerate_loop": ["accelerate"],
    "hf_trainer": ["transformers", "accelerate"],
    "lightning_module": ["pytorch_lightning"],
    "peft_lora": ["transformers", "peft"],
}


def without_numbers(text):
    return re.sub(r"[\d.]+(e-\d+)?", "#", text).strip()


def test_every_example_is_on_the_page():
    files = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert set(SHOWN) == files - {"own_loop", "own_rule"}


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*", "ignore:The .grad attribute"
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("compiled_blocks", "sklearn_table") else ())
        for name in SHOWN
        if name != "data_parallel"
    ],
)
def test_an_example_prints_what_the_page_says(name, capsys):
    for package in NEEDS.get(name, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]()
    assert without_numbers(capsys.readouterr().out) == without_numbers(SHOWN[name])


@pytest.mark.slow
def test_two_processes_print_what_the_page_says():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, ROOT / "examples" / "data_parallel.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert without_numbers(done.stdout) == without_numbers(SHOWN["data_parallel"])
