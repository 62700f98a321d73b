"""The built site in a browser: it is accessible to every reader, and requests nothing from the network."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.browser import browse, needs_axe, needs_chromium, serious
from support.pages import ROOT

from layerwise import rules

pytestmark = [pytest.mark.slow, needs_chromium]
SEEN = ["index.html", "rules/index.html", "rules/sll/index.html", "compare/index.html", "results/index.html"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    place = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", place]
    subprocess.run(words, cwd=ROOT, check=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return place


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served: a browser keeps a page in a file from reading its neighbours."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_axe
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, False), (1280, True)], ids=["desk", "phone", "dark"])
@pytest.mark.parametrize("name", SEEN)
def test_axe_finds_nothing_serious(site, address, tmp_path, name, width, dark):
    file = (site / name).with_name("audited.html")
    place = f"{address}/{file.relative_to(site)}"
    assert serious((site / name).read_text(), file, tmp_path / "profile", width, dark, place) == []


FILTER = """<script>
addEventListener("load", () => {
  const [locality, task] = document.querySelectorAll("#filter select");
  locality.value = "local";
  locality.dispatchEvent(new Event("change", {bubbles: true}));
  task.value = "segmentation";
  task.dispatchEvent(new Event("change", {bubbles: true}));
  const rows = [...document.querySelectorAll("tbody tr")].filter(row => row.getClientRects().length);
  document.body.dataset.found = JSON.stringify([rows.map(row => row.cells[0].textContent.trim()), location.search,
    document.querySelector("#filter output").textContent]);
});
</script>"""


def test_rules_are_found_by_what_they_declare(site, address, tmp_path):
    page = site / "rules" / "index.html"
    file = page.with_name("filtered.html")
    place = f"{address}/rules/filtered.html"
    shown, asked, count = browse(page.read_text(), FILTER, file, tmp_path / "profile", address=place)
    kinds = {name: rules.get(name) for name in rules.names()}
    found = [name for name, rule in kinds.items() if rule.locality == "local" and "segmentation" in rule.tasks]
    assert sorted(shown) == sorted(found)
    assert (asked, count) == ("?locality=local&task=segmentation", f"{len(found)} of {len(kinds)}")


def test_the_search_knows_the_methods_of_papers(site):
    """A method's name leads to the page of its rule; the search takes small and capital letters as one."""
    pages = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    for method, rule in METHODS.items():
        found = {
            page["location"].partition("#")[0]
            for page in pages
            if method.lower() in f"{page['title']} {page['text']}".lower()
        }
        assert f"rules/{rule}/" in found, method


METHODS = {
    **{"Mono-Forward": "mono_forward", "Forward-Forward": "forward_forward", "DRTP": "feedback_alignment"},
    **{"PEPITA": "pepita", "NoProp": "noprop_dt", "MeZO": "zeroth_order", "BAdam": "block_rota", "LISA": "block_rota"},
    **{"DNI": "synthetic_gradient", "InfoPro": "infopro", "AugLocal": "auglocal", "SGR": "gradient_reconciliation"},
    **{"GHL": "hebbian_global", "LOMO": "backprop_fused", "DFA": "feedback_alignment", "LoPT": "lopt"},
    **{"Kolen-Pollack": "feedback_alignment", "Highway-BP": "highway_backprop", "ForwardGNN": "graph_forward"},
    **{"DSF": "stationary_feedback"},
}
"""Names that papers give their methods, and the rules here."""
