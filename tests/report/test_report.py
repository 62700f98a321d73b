"""The report: its contents, that it needs no other file, and that a browser shows it."""

import html
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from support.browser import browse, needs_axe, needs_chromium, serious
from support.runs import contents, split

from layerwise import LayerwiseError
from layerwise.cli.main import main
from layerwise.report import confusion, figures
from layerwise.report import page as report

pytest.importorskip("matplotlib", reason="the report extra is not installed")
pytest.importorskip("jinja2", reason="the report extra is not installed")

FIGURES = [
    *("accuracy_epochs", "accuracy_seconds", "memory_depth", "accuracy_memory", "accuracy_flops", "accuracy_time"),
    "time_memory",
    *("layers_accuracy", "layers_probe_accuracy", "layers_bhattacharyya", "layers_cka", "layers_cka_to_backprop"),
    *("layers_gradient_cosine", "layers_hoyer", "layers_dead", "layers_divergence"),
    *("confusion_sll", figures.file_name("confusion_sll:overlap=1"), "confusion_backprop"),
    *("filters_sll", figures.file_name("filters_sll:overlap=1"), "filters_backprop"),
]
RULES = ("sll", "sll:overlap=1", "backprop")


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    return shutil.copytree(comparison, tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def test_every_figure_is_there_with_its_files_and_a_description(folder, page):
    shown = re.findall(r'<figure id="([\w-]+)"', page)
    assert shown == FIGURES
    labels = [html.unescape(label) for label in re.findall(r'role="img" aria-label="([^"]*)">', page)]
    assert len(labels) == len(shown)
    for name, label in zip(shown, labels, strict=True):
        assert len(label) > 40
        assert ("sll" in label or name in ("confusion_backprop", "filters_backprop")) and (
            "divergence" in name or name.startswith(("confusion_sll", "filters_sll")) or "backprop" in label
        )
        ElementTree.parse(folder / "figures" / f"{name}.svg")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_that_of_the_summary(folder, page):
    found = json.loads((folder / "summary.json").read_text())["rules"]
    table = html.unescape(page[page.index("<table ") : page.index("</table>")])
    for rule in RULES:
        accuracy = found[rule]["test_accuracy"]
        row = next(row for row in table.split("<tr>") if f">{rule}</a></th>" in row)
        assert '<th scope="row"><a href="#rule-' in row
        assert f"<td>{100 * accuracy['mean']:.2f} ± {100 * accuracy['sd']:.2f}</td>" in row
        assert f"<td>{found[rule]['peak_mib']['mean']:.2f}</td>" in row


def test_the_page_stands_alone_and_says_how_it_was_made(folder, page):
    """What it links to is its own files, and papers: nothing is fetched to show it."""
    assert not re.search(
        r"<(link|img|iframe)\b|@import|src=|(?<!<a )href=\"(?!#|data:image/png;)|fetch\(|XMLHttpRequest", page
    )
    assert page.count("<script") == 1
    for target in re.findall(r'<a href="([^"]+)"', page):
        assert target.startswith(("#rule-", "https://arxiv.org/abs/")) or (folder / target).is_file()
    assert not re.search(r"https?://(?!www\.w3\.org/|arxiv\.org/abs/)", page)
    text = html.unescape(page)
    assert json.loads((folder / "compare.json").read_text())["command"] in text
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


@pytest.mark.slow
def test_benchmarks_are_drawn_beside_a_comparison_and_alone(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "out")
    common = split(f"--shape 1 8 8 --batch-size 4 --threads 1 --model.width 16 --out {place}")
    assert main(["bench", "memory", *common, "--depths", "2,5", "--rule", "sll", "backprop"]) == 0
    assert main(["bench", "speed", *common, *split("--model mlp --depth 2 --rounds 2 --rule sll backprop")]) == 0
    assert main(["report", str(place)]) == 0
    page = html.unescape((place / "report.html").read_text())
    shown = re.findall(r'<figure id="([\w-]+)"', page)
    for file in ("memory.json", "speed.json"):
        assert json.loads((place / file).read_text())["command"] in page
    assert shown == [*FIGURES, "memory_mlp", "speed_time"]
    assert all((place / "figures" / f"{name}.svg").exists() for name in shown)
    rows = json.loads((place / "memory.json").read_text())["rows"]
    (tmp_path / "mlp.json").write_text(json.dumps(rows))
    (tmp_path / "notes.json").write_text('{"some": "thing"}')
    assert report.write_report(tmp_path) == tmp_path / "report.html"
    assert '<figure id="mlp_mlp" ' in (tmp_path / "report.html").read_text()


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


def test_every_rule_is_explained_once_with_its_paper(page):
    text = html.unescape(page)
    assert re.findall(r'<dt id="rule-(\w+)">', page) == ["sll", "backprop"]
    assert "every block maximises its own ELBO-like objective" in text
    assert "a block learns from its own loss only" in text
    assert 'href="https://arxiv.org/abs/2505.05181"' in page


def contrast(one, other):
    light, dark = sorted((figures.luminance(one), figures.luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_numbers_and_lines_can_be_read():
    """WCAG 2.2: 4.5 to 1 for text on every colour of a heat map, 3 to 1 for lines on the panels of both modes."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    for i in range(256):
        colour = colormaps["viridis"](i)
        assert contrast(colour, to_rgb(figures.readable_on(colour))) >= 4.5
    style = Path(report.__file__).with_name("page.html").read_text()
    panels = re.findall(r"--panel: (#\w+)", style)
    assert len(panels) == 2
    for panel in panels:
        assert min(contrast(to_rgb(colour), to_rgb(panel)) for colour in figures.COLOURS) >= 3


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
  document.querySelectorAll("details.fold").forEach(part => part.open = true);
  const boxes = [...document.querySelectorAll(".drawing > svg")].map(svg => svg.getBoundingClientRect());
  document.body.dataset.found = JSON.stringify({
    wide: document.documentElement.scrollWidth, window: innerWidth, rows: document.querySelectorAll("tbody tr").length,
    figures: boxes.length, empty: boxes.filter(box => box.width < 200 || box.height < 50).length,
    ink: getComputedStyle(document.body).color, back: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.querySelector("figure svg text")).fill,
  });
});
</script>"""


@needs_chromium
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1280, False, id="desk"),
        pytest.param(500, False, id="phone", marks=pytest.mark.slow),
        pytest.param(1280, True, id="dark", marks=pytest.mark.slow),
    ],
)
def test_a_browser_shows_it(page, tmp_path, width, dark):
    """Headless Chromium: no error, every figure drawn, nothing wider than the window, the right colours."""
    found = browse(page, PROBE, tmp_path / "report.html", tmp_path / "profile", width, dark)
    assert (found["rows"], found["figures"], found["empty"]) == (3, len(FIGURES), 0)
    assert found["wide"] <= found["window"] == width
    colours = ["rgb(31, 35, 40)", "rgb(255, 255, 255)"] if not dark else ["rgb(230, 237, 243)", "rgb(13, 17, 23)"]
    assert [found["ink"], found["back"]] == colours
    assert found["text"] == found["ink"]


USE = """<script>
addEventListener("load", () => {
  const found = {};
  const order = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent.trim());
  const heads = [...document.querySelectorAll("thead th")];
  const button = heads.find(head => head.textContent.includes("peak")).querySelector("button");
  button.click();
  found.up = [order(), button.parentElement.ariaSort];
  button.click();
  found.down = [order(), button.parentElement.ariaSort];

  const figure = document.getElementById("memory_depth");
  const svg = figure.querySelector(".drawing > svg"), tip = figure.querySelector(".tip");
  const marks = document.getElementById("memory_depth-series-2").querySelectorAll("use");
  const point = to => {
    const box = marks[marks.length - 1].getBoundingClientRect();
    const [clientX, clientY] = [box.x + box.width / 2 + to, box.y + box.height / 2];
    svg.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
    return tip.hidden ? null : tip.innerText;
  };
  found.hover = point(-4);
  const legend = [...figure.querySelectorAll(".legend button")];
  found.legend = legend.map(button => button.textContent);
  legend[2].click();
  found.hidden = [legend[2].ariaPressed, getComputedStyle(document.getElementById("memory_depth-series-2")).display];
  found.other = point(0);
  legend[2].click();
  found.again = [legend[2].ariaPressed, point(0)];
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  found.left = tip.hidden;

  document.querySelectorAll("details.fold").forEach(part => part.open = true);
  const words = (figure, clientX, clientY) => {
    figure.querySelector(".drawing > svg").dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
    const tip = figure.querySelector(".tip");
    return tip.hidden ? null : tip.innerText;
  };
  const heat = document.getElementById("layers_accuracy");
  found.cells = [...heat.querySelectorAll("svg text")].map(text => {
    const box = text.getBoundingClientRect();
    return [text.textContent, words(heat, box.x + box.width / 2, box.y + box.height / 2)];
  }).filter(([, tip]) => tip);
  const table = document.getElementById("confusion_backprop"), seen = new Set();
  const box = table.querySelector(".drawing > svg").getBoundingClientRect();
  for (let x = 0; x < box.width; x += 3) for (let y = 0; y < box.height; y += 3)
    seen.add(words(table, box.x + x, box.y + y));
  found.taken = [...seen].filter(tip => tip);

  found.saved = [];
  HTMLAnchorElement.prototype.click = function () {
    found.saved.push([this.download, this.href.slice(0, 200000)]);
    if (this.download.endsWith("png")) document.body.dataset.found = JSON.stringify(found);
  };
  const press = link => link.dispatchEvent(new MouseEvent("click", {cancelable: true}));
  figure.querySelectorAll("a[download]").forEach(press);
});
</script>"""


@pytest.mark.slow
@needs_chromium
def test_the_table_sorts_and_the_figures_answer(folder, page, tmp_path):
    """Headless Chromium: sorting, the point under the pointer, hiding a series, saving a figure."""
    held = json.loads((folder / "summary.json").read_text())["rules"]
    found = browse(page, USE, tmp_path / "report.html", tmp_path / "profile")
    peaks = {rule: held[rule]["peak_mib"]["mean"] for rule in RULES}
    assert found["up"] == [sorted(RULES, key=lambda rule: peaks[rule]), "ascending"]
    assert found["down"] == [sorted(RULES, key=lambda rule: -peaks[rule]), "descending"]
    depth, size = max(((int(depth), size) for depth, size in held["backprop"]["held_at"].items()))
    name, y, x = found["hover"].splitlines()
    assert (name, x) == ("backprop", f"number of blocks: {depth}")
    assert float(y.removeprefix("MiB: ")) == pytest.approx(size / 2**20, rel=1e-3)
    assert found["legend"] == list(RULES)
    assert found["hidden"] == ["false", "none"]
    assert "backprop" not in found["other"].splitlines()
    assert found["again"] == ["true", found["hover"]]
    assert found["left"] is True
    drawn = {rule for _, tip in found["cells"] for rule in [tip.splitlines()[0]]}
    assert drawn == set(RULES)
    assert all(tip.endswith(f": {label}") for label, tip in found["cells"])  # the number that is drawn in the cell
    seeds = [
        json.loads(file.read_text())["confusion"] for file in sorted(folder.glob("runs/backprop/*/diagnostics.json"))
    ]
    shares = {block: confusion.mistakes(counts) for block, counts in confusion.summed(seeds).items()}
    assert set(found["taken"]) == {
        f"class {i}\n{block}, taken for {j}: {share:.1%}"
        for block, table in shares.items()
        for i, row in enumerate(table)
        for j, share in enumerate(row)
        if share is not None
    }
    (svg, drawing), (png, picture) = sorted(found["saved"], key=lambda saved: saved[0], reverse=True)
    assert (svg, png) == ("memory_depth.svg", "memory_depth.png")
    root = ElementTree.fromstring(unquote(drawing.partition(",")[2]))
    assert "backprop" in "".join(root.itertext())  # with its legend
    assert picture.startswith("data:image/png;base64,iVBOR")


@needs_chromium
@needs_axe
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, False), (1280, True)], ids=["desk", "phone", "dark"])
def test_axe_finds_nothing_serious(page, tmp_path, width, dark):
    assert serious(page, tmp_path / "report.html", tmp_path / "profile", width, dark) == []
