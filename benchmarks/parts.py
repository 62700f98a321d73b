"""Cut the Parquet files of a data set into smaller files that can be transferred.

    python benchmarks/parts.py FOLDER OUT [--mib 40]

`FOLDER/cifar10/plain_text/train-00000-of-00002.parquet` becomes `OUT/cifar10/plain_text/train-00000-0.parquet` and so
on: the names keep their split, so that the library reads the parts like the whole files.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq


def main() -> int:
    """Write the parts, and print their names and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mib", type=int, default=40)
    given = parser.parse_args()
    for file in sorted(given.folder.rglob("*.parquet")):
        table = pq.read_table(file)
        count = -(-file.stat().st_size // int(0.95 * given.mib * 2**20))  # room for what compresses less well
        rows = -(-len(table) // count)
        place = given.out / file.parent.relative_to(given.folder)
        place.mkdir(parents=True, exist_ok=True)
        for part in range(count):
            name = place / f"{file.name.partition('-of-')[0].removesuffix('.parquet')}-{part}.parquet"
            pq.write_table(table.slice(part * rows, rows), name)
            print(f"{name.stat().st_size / 2**20:6.1f} MiB  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
