"""The command of a measurement, as its README and its results name it."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def command_of(script: str, arguments: Sequence[str] | None = None) -> str:
    """The command that runs a script of `benchmarks/`, without the folder of this machine that it was given.

    Args:
        script: its `__file__`.
        arguments: those of the command line if not given.

    >>> command_of("/home/me/layerwise/benchmarks/claim/measure.py", ["--rounds", "3", "--folder", "/mnt/disk"])
    'python benchmarks/claim/measure.py --rounds 3'
    """
    place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    place.add_argument("--folder")
    words = place.parse_known_args(sys.argv[1:] if arguments is None else arguments)[1]
    return shlex.join(["python", "/".join(["benchmarks", *Path(script).parts[-2:]]), *words])
