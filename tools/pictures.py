"""Pictures of a report for the docs: `python tools/pictures.py runs/first`, with Chromium and Pillow.

Writes desktop, phone and dark mode, as a browser shows them, to `docs/images/report-*.png` with few colours. The folder
is that of a comparison, such as the README's `layerwise compare --epochs 10 --out runs/first`.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PAGES = {  # name of the picture: width and height in CSS pixels, dark or light
    "report-desktop": (1280, 1650, False),
    "report-phone": (390, 1650, False),
    "report-dark": (1280, 1650, True),
}
COLOURS = 64


def picture(report: Path, width: int, height: int, dark: bool) -> Image.Image:
    """The top of a page as Chromium shows it; in a frame, because its windows cannot be as narrow as a phone."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no Chromium on this machine (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as place:
        frame, shot = Path(place, "frame.html"), Path(place, "shot.png")
        style = f"border:0;width:{width}px;height:{height}px"
        frame.write_text(f'<body style="margin:0"><iframe style="{style}" src="{report.resolve().as_uri()}"></iframe>')
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={place}/profile"]
        words += [f"--window-size={max(width, 600)},{height}", f"--screenshot={shot}", frame.as_uri()]
        words += ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([browser, *words], check=True, timeout=120, stderr=subprocess.DEVNULL)
        return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB").crop((0, 0, width, height))


def main() -> None:
    if len(sys.argv) != 2 or not (report := Path(sys.argv[1], "report.html")).is_file():
        sys.exit("give the folder of a comparison with its report: python tools/pictures.py runs/first")
    IMAGES.mkdir(exist_ok=True)
    for name, how in PAGES.items():
        file = IMAGES / f"{name}.png"
        picture(report, *how).quantize(COLOURS).save(file, optimize=True)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
