"""No test of the core may leave a suspended pass, or a changed mode of autograd."""

import greenlet
import pytest
import torch
from support.coroutines import Noted, suspended


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch):
    monkeypatch.setattr(greenlet, "greenlet", Noted)
    yield
    assert not suspended()
    assert torch.is_grad_enabled()
