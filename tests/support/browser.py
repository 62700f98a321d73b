"""Headless Chromium: the result of a script on a page, and the findings of axe-core."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.pages import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLACES = [os.environ.get("AXE_CORE", ""), ROOT / "node_modules" / "axe-core"]
AXE = next((file for place in PLACES if (file := Path(place) / "axe.min.js").is_file()), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
needs_axe = pytest.mark.skipif(
    AXE is None, reason="no axe-core: npm install --no-save axe-core, or name its folder in AXE_CORE"
)
AUDIT = """<script>
addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  const {violations} = await axe.run(document, {resultTypes: ["violations"]});
  document.body.dataset.found = JSON.stringify(violations.map(({id, impact, nodes}) =>
    [id, impact, nodes.map(node => `${node.html.slice(0, 200)} ${node.any[0]?.message ?? ""}`)]));
});
</script>"""


def browse(
    page: str, probe: str, file: Path, profile: Path, width: int = 1280, dark: bool = False, address: str | None = None
):
    """The value that the script `probe`, put at the end of `page`, writes to `document.body.dataset.found`.

    The page is written to `file`, next to the files that it refers to, and opened there or at `address`. Any message on
    the console is a failure.
    """
    file.write_text(page.replace("</body>", probe + "</body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    words += [f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    settings = "primaryHoverType=2,availableHoverTypes=2"  # a mouse, which headless Chromium lacks
    words.append(f"--blink-settings={settings}" + (",preferredColorScheme=0" if dark else ""))
    done = subprocess.run([CHROMIUM, *words, address or file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))


def serious(page: str, file: Path, profile: Path, width: int, dark: bool, address: str | None = None) -> list[list]:
    """Findings of axe-core that it calls serious or critical: name of the check, impact, elements."""
    probe = f"<script>{AXE.read_text()}</script>{AUDIT}"
    found = browse(page, probe, file, profile, width, dark, address)
    return [row for row in found if row[1] in ("serious", "critical")]
