"""Notebooks of two guides: `python tools/notebooks.py` writes them, `--check` compares and runs them (extra `docs`).

A guide's text becomes cells of text, its Python becomes cells of code, and a command line a cell that starts it. What
the guide shows as output is left out, as the notebook shows its own.
"""

import difflib
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
GUIDES = ("quickstart", "your-own-network")
POINTER = "This page is a [notebook](../notebooks/{}.ipynb), too.\n\n"
FENCE = re.compile(r"^```(python|pycon|console)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def notebook(guide: str) -> nbformat.NotebookNode:
    """The notebook of a guide."""
    text = (ROOT / "docs" / f"{guide}.md").read_text().replace(POINTER.format(guide), "")
    cells, place = [], 0

    def prose(part: str) -> None:
        part = LINK.sub(r"](../docs/\1)", part).replace("](../docs/../", "](../").strip()
        if part:
            cells.append(nbformat.v4.new_markdown_cell(part))

    for found in FENCE.finditer(text):
        prose(text[place : found.start()])
        tags = {"tags": ["raises-exception"]} if "Traceback" in found[2] else {}  # an error that the guide shows
        cells.append(nbformat.v4.new_code_cell(code(found[1], found[2]).strip(), metadata=tags))
        place = found.end()
    prose(text[place:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # nbformat draws one at random
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def code(language: str, text: str) -> str:
    """What a cell runs, of a block of Python, of a Python session or of a shell."""
    if language == "python":
        return text
    if language == "pycon":
        return "\n".join(line[4:] for line in text.splitlines() if line.startswith((">>> ", "... ")))
    return "\n".join(f"!{line[2:]}" for line in text.splitlines() if line.startswith("$ "))


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    for guide in GUIDES:
        file, made = ROOT / "notebooks" / f"{guide}.ipynb", notebook(guide)
        text = nbformat.writes(made) + "\n"
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            continue
        there = file.read_text() if file.exists() else ""
        if there != text:
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), "committed", "from the guide", n=0)
            sys.exit("\n".join([f"{file.name} is not that of its guide; run `python tools/notebooks.py`.", *lines]))
        for cell in made.cells:
            if cell.source.startswith("!"):  # a shell's failure is no error of the cell
                cell.source = "\n".join(f"{line}\nassert _exit_code == 0" for line in cell.source.splitlines())
        with tempfile.TemporaryDirectory() as folder:  # for the runs that it writes
            # Files in place of ports, which others could find; their path is whole, as the kernel works in the folder.
            kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
            NotebookClient(made, kernel, timeout=120, resources={"metadata": {"path": folder}}).execute()
        print(f"{file.name}: {len(made.cells)} cells, runs")


if __name__ == "__main__":
    main()
