"""The built site in a browser: nothing that keeps a reader out, and nothing that is asked of the network."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.browser import browse, needs_axe, needs_chromium, serious
from support.pages import ROOT

pytestmark = [pytest.mark.slow, needs_chromium]
SEEN = ["index.html", "rules/index.html", "rules/sll/index.html", "compare/index.html", "your-own-network/index.html"]


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
