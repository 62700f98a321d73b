"""One thread: the nets here are so small that a second thread only waits, and bits depend on the count.

One seed before every test, so that a test that fails will fail again.
"""

import gc
import os
import sys

import hypothesis
import pytest
import torch
from filelock import FileLock
from support.nets import seed
from support.runs import COMPARE, start, stop_all

# On a slow or busy machine generated input takes longer, which says nothing about the code.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


def pytest_collection_finish():
    """Imported objects stay, so the garbage collector need not scan them again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """What needs the comparison comes first, so that one worker makes it and no other one waits for it."""
    items.sort(key=lambda item: "comparison" not in item.fixturenames)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Printed output is not wrapped to the width of the terminal that pytest runs in."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _one_seed():
    seed(0)


@pytest.fixture(autouse=True)
def _nothing_left():
    """No process goes on, and a rule of one's own leaves no folder behind in which another test would find modules."""
    path = sys.path[:]
    yield
    sys.path[:] = path
    stop_all()


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """The folder of a small comparison with its report, made as a user makes it; once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "comparison"
    with FileLock(f"{place}.lock"):
        if not (place / "stderr").exists():
            process = start(*COMPARE, "--jobs", "1", "--out", place / "out")
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
            (place / "stdout").write_text(out)
            (place / "stderr").write_text(err)
    return place / "out"
