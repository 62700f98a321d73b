"""The report: what is in it, that it needs nothing else, and that a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
from support.runs import contents, split

from layerwise import LayerwiseError
from layerwise.cli.main import main
from layerwise.report import figures
from layerwise.report import page as report

pytest.importorskip("matplotlib", reason="the report extra is not installed")
pytest.importorskip("jinja2", reason="the report extra is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FIGURES = [
    *("accuracy_epochs", "accuracy_seconds", "memory_depth", "accuracy_memory", "accuracy_flops", "accuracy_time"),
    *("layers_accuracy", "layers_probe_accuracy", "layers_bhattacharyya", "layers_cka", "layers_cka_to_backprop"),
    *("layers_gradient_cosine", "layers_hoyer", "layers_dead", "layers_divergence"),
]
RULES = ("sll", "sll:overlap=1", "backprop")


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    """A comparison with benchmarks beside it, which are measured first: each draws what is there."""
    folder = tmp_path_factory.mktemp("report") / "out"
    common = split("--shape 1 8 8 --batch-size 4 --threads 1 --model.width 16")
    common += ["--out", str(folder)]
    assert main(["bench", "memory", *common, "--depths", "2,5", "--rule", "sll", "backprop"]) == 0
    assert main(["bench", "speed", *common, *split("--model mlp --depth 2 --rounds 2 --rule sll backprop")]) == 0
    shutil.copytree(comparison, folder, dirs_exist_ok=True)
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def test_every_figure_is_there_with_its_files_and_a_description(folder, page):
    shown = re.findall(r'<figure id="(\w+)">', page)
    assert shown == [*FIGURES, "memory_mlp", "speed_time"]
    labels = [html.unescape(label) for label in re.findall(r'<div role="img" aria-label="([^"]*)">', page)]
    assert len(labels) == len(shown)
    for name, label in zip(shown, labels, strict=True):
        assert len(label) > 40
        assert "sll" in label and ("divergence" in name or "backprop" in label)
        ElementTree.parse(folder / "figures" / f"{name}.svg")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_that_of_the_summary(folder, page):
    found = json.loads((folder / "summary.json").read_text())["rules"]
    table = html.unescape(page[page.index("<table>") : page.index("</table>")])
    for rule in RULES:
        accuracy = found[rule]["test_accuracy"]
        row = next(row for row in table.split("<tr>") if f"<td>{rule}</td>" in row)
        assert f"<td>{100 * accuracy['mean']:.2f} ± {100 * accuracy['sd']:.2f}</td>" in row
        assert f"<td>{found[rule]['peak_mib']['mean']:.2f}</td>" in row


def test_the_page_stands_alone_and_says_how_it_was_made(folder, page):
    assert not re.search(r"<(script|link|img|iframe)\b|@import|(src|href)=\"(?!#)", page)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    text = html.unescape(page)
    for file in ("compare.json", "memory.json", "speed.json"):
        assert json.loads((folder / file).read_text())["command"] in text
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    for target in re.findall(r'(?:url\(#|href="#)([^)"]+)', page):
        assert target in identifiers


@pytest.mark.slow
def test_drawing_it_again_gives_the_same_bytes(folder, tmp_path):
    before = contents(folder)
    assert main(["report", str(folder)]) == 0
    assert contents(folder) == before


@pytest.mark.slow
def test_a_failed_rule_is_shown_with_its_reason(folder, tmp_path):
    place = tmp_path / "out"
    shutil.copytree(folder, place)
    rows = (place / "results.csv").read_text().splitlines()
    rows = [
        row if not row.startswith("backprop,") else re.sub(",ok,.*", ",failed,it broke <down>", row) for row in rows
    ]
    (place / "results.csv").write_text("\n".join(rows) + "\n")
    found = json.loads((place / "summary.json").read_text())
    failed = [{"seed": seed, "reason": "it broke <down>"} for seed in (0, 1)]
    none = dict.fromkeys(found["rules"]["backprop"].keys() - {"held_at"})  # which is measured before any run
    found["rules"]["backprop"] = none | {"n": 0, "failed": failed, "lr": 0.001, "weight_decay": 0.01}
    (place / "summary.json").write_text(json.dumps(found))
    report.write_report(place)
    page = (place / "report.html").read_text()
    assert '<td class="reason failed" colspan="5">failed: it broke &lt;down&gt;</td>' in page
    assert "<strong>backprop seed 1</strong>: it broke &lt;down&gt;" in page


def test_benchmarks_in_their_plain_form_are_drawn(folder, tmp_path):
    rows = json.loads((folder / "memory.json").read_text())["rows"]
    (tmp_path / "mlp.json").write_text(json.dumps(rows))
    (tmp_path / "notes.json").write_text('{"some": "thing"}')
    assert report.write_report(tmp_path) == tmp_path / "report.html"
    assert '<figure id="mlp_mlp">' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "report takes one folder"),
        (["nowhere"], "there is no folder nowhere"),
        (["."], ". holds neither a comparison nor a benchmark"),
    ],
)
def test_wrong_use_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_its_libraries_the_report_says_so(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(LayerwiseError, match=r"pip install 'layerwise\[report\]'"):
        report.write_report(folder)


def test_an_svg_follows_the_mode_and_bytes_depend_on_nothing_else():
    found = {"sll": [(1.0, 50.0, None), (2.0, 60.0, None)]}

    def draw():
        looks = figures.look(["sll"])
        return figures.render("x", "t", "a", lambda axes: figures.curves(axes, found, "epochs", "%", looks))

    one, two = draw(), draw()
    assert (one.svg, one.png) == (two.svg, two.png)
    assert "currentColor" in one.svg
    assert figures.INK not in one.svg
    assert "<image" not in one.svg


@pytest.mark.parametrize(("points", "front"), [
    ({"a": (1, 5), "b": (1, 6), "c": (2, 6), "d": (3, 7)}, [(1, 6), (3, 7)]),
    ({"a": (2, 1)}, [(2, 1)]),
])  # fmt: skip
def test_the_front_holds_what_no_other_beats(points, front):
    assert figures.pareto(points) == front


PROBE = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  document.body.dataset.found = JSON.stringify({
    wide: document.documentElement.scrollWidth, window: innerWidth, rows: document.querySelectorAll("tbody tr").length,
    figures: boxes.length, empty: boxes.filter(box => box.width < 200 || box.height < 50).length,
    ink: getComputedStyle(document.body).color, back: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.querySelector("figure svg text")).fill,
  });
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, False), (1280, True)], ids=["desk", "phone", "dark"])
def test_a_browser_shows_it(page, tmp_path, width, dark):
    """Headless Chromium: no error, every figure drawn, nothing wider than the window, the right colours."""
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", PROBE + "</body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom"]
    if dark:
        words.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run([CHROMIUM, *words, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert (found["rows"], found["figures"], found["empty"]) == (3, len(FIGURES) + 2, 0)
    assert found["wide"] <= found["window"] == width
    colours = ["rgb(31, 35, 40)", "rgb(255, 255, 255)"] if not dark else ["rgb(230, 237, 243)", "rgb(13, 17, 23)"]
    assert [found["ink"], found["back"]] == colours
    assert found["text"] == found["ink"]
