"""A rank of a pipeline keeps its own blocks alone, also while the network is built."""

import json
import subprocess
import sys

import pytest

BUILT = """
import json, resource, sys
import torch
from layerwise.parallel.stage import Stage
from layerwise.runs import building
from layerwise.runs.options import from_mapping

def built(folder, *stage):
    options = from_mapping({"model": {"name": "mlp", "width": 2048, "depth": 16}, "out": folder})
    facts = building.DataSignature((1, 8, 8), tuple("0123456789"), (0.5,), (0.5,), (8, 8, 8))
    learner = building.build_learner(options, facts, torch.device("cpu"), 1, *stage)
    return {name: p.sum().item() for name, p in learner.network.named_parameters() if not p.is_meta}
"""
RANK = f"""{BUILT}
torch.set_num_threads(1)
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**27, used + 2**27))
print(json.dumps(built(sys.argv[1], Stage(1, 3, [7, 2, 7]))))
"""


@pytest.mark.slow
def test_a_rank_builds_a_network_that_is_larger_than_what_it_may_use(tmp_path):
    """Of 15 blocks with 16 MiB each it keeps two and may use 128 MiB; they have the values that they always have."""
    process = subprocess.run([sys.executable, "-c", RANK, tmp_path], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    part = json.loads(process.stdout)
    names = {}
    exec(BUILT, names)
    whole = names["built"](str(tmp_path))
    assert len(part) * 7 < len(whole)
    assert part.items() <= whole.items()
