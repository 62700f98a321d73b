"""The report of a comparison on text: bits per byte over seconds, the loss of each block, what each rule wrote."""

import html
import json

import pytest
from support.runs import split

from layerwise.cli.main import main

pytest.importorskip("matplotlib", reason="the report extra is not installed")
pytest.importorskip("jinja2", reason="the report extra is not installed")


@pytest.mark.slow
def test_the_page_shows_blocks_and_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("a < b & the sea is wide\n" * 150)
    words = split("--rule local_ce --seeds 1 --jobs 1 --steps 4 --eval-every 2 --batch-size 8 --data.window 8")
    words += split("--model.width 8 --model.heads 2 --model.depth 2 --threads 1")
    assert main(["compare", *words, "--data", f"text:{tmp_path / 'a.txt'}", "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    result = json.loads((tmp_path / "out" / "runs" / "local_ce" / "seed0" / "result.json").read_text())
    assert summary["metric"] == "bits_per_byte"
    assert summary["rules"]["local_ce"]["test_bits_per_byte"]["mean"] == result["test_bits_per_byte"]
    page = (tmp_path / "out" / "report.html").read_text()
    for figure in ("accuracy_seconds", "blocks_local_ce", "layers_bits_per_byte", "layers_perplexity"):
        assert f'<figure id="{figure}"' in page
    sample = result["sample"]
    assert html.escape(sample["prompt"], quote=False) in page and "<h2>Text that they write</h2>" in page
    assert len(sample["text"]) == 100 and sample["prompt"] == (tmp_path / "a.txt").read_text()[: len(sample["prompt"])]
