"""Fixtures of the tests with the widget; a plugin of the modules that use them."""

import pytest
import torch

from dfpir.restorer import Restorer


@pytest.fixture
def small(tiny_model, monkeypatch):
    """Let the widget work with a small network."""
    restorer = Restorer(model=tiny_model)
    monkeypatch.setattr("dfpir.restorer.shared_restorer", lambda *_: restorer)
    return restorer


@pytest.fixture(autouse=True)
def one_thread():
    """The widget leaves a thread to the screen, and the last bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said(monkeypatch):
    """What is notified, in place of pop-ups."""
    from dfpir_napari import _widget

    lines = []
    for name in ("show_error", "show_info", "show_warning"):
        monkeypatch.setattr(_widget, name, lines.append)
    return lines
