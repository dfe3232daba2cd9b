"""What a user reaches by menus, palette and preferences, in a real viewer. Needs a display."""

import os
import sys

import numpy as np
import pytest

pytest.importorskip("napari", reason="napari is not installed")
pytest.importorskip("pytestqt", reason="pytest-qt is not installed")
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    pytest.skip("no display: run under xvfb-run -a", allow_module_level=True)

import napari.settings
from napari._app_model import get_app_model
from napari.layers import Image
from npe2 import PluginManifest
from qtpy.QtWidgets import QApplication, QMainWindow

from dfpir_napari._commands import opened
from dfpir_napari._settings import Settings, read_settings
from dfpir_napari._widget import WIDGETS

pytest_plugins = ["napari_fixtures"]

PATIENCE = 120_000
"""Milliseconds; nothing waits that long on a machine that is not overloaded."""


def choose(*path):
    """Trigger a menu item, opening one menu after the other as a hand does."""
    (window,) = (each for each in QApplication.topLevelWidgets() if isinstance(each, QMainWindow))
    menu = window.menuBar()
    for words in path:
        shown = {each.text().replace("&", ""): each for each in menu.actions()}
        assert words in shown, f"{words!r} is not among {sorted(shown)}"
        action, menu = shown[words], shown[words].menu()
        if menu is not None:
            menu.aboutToShow.emit()
    assert action.isEnabled()
    action.trigger()


def command(name):
    """Run a command as the palette does."""
    get_app_model().commands.execute_command(f"dfpir.{name}").result()


def only_widget(viewer):
    """Return the plugin's widget in a viewer; there is never a second one, with its own undo."""
    (widget,) = (each for each in WIDGETS if each.show_in(viewer.window))
    return widget


def wait(qtbot, widget):
    qtbot.waitUntil(lambda: not widget.running and not widget._queue, timeout=PATIENCE)


@pytest.mark.parametrize(
    "way",
    [
        ("Plugins", "Restoration (dfpir image restoration)"),
        ("Layers", "Filter", "Restoration (dfpir image restoration)"),
    ],
    ids=["plugins", "layers"],
)
def test_a_newcomer_gets_from_sample_to_undo(qtbot, small, said, make_napari_viewer_proxy, way):
    viewer = make_napari_viewer_proxy()
    choose("File", "Open Sample", "dfpir image restoration", "Noisy micrograph (16 bits)")
    layer = viewer.layers["noisy micrograph"]
    original = np.asarray(layer.data)
    viewer.layers.selection.active = layer
    choose(*way)
    widget = only_widget(viewer)
    assert opened(viewer) is widget
    assert widget.layer.value == layer and "Diagnose" in widget._status.text()
    for name in ("diagnose", "preview"):
        getattr(widget, name).native.click()
        wait(qtbot, widget)
        assert "noise" in widget._found.text()
    assert "noisy micrograph preview" in viewer.layers
    widget.restore.native.click()
    wait(qtbot, widget)
    assert [each.name for each in viewer.layers] == ["noisy micrograph"]
    assert (layer.data != original).any() and layer.data.dtype == original.dtype
    assert layer.metadata["dfpir"][0]["steps"][0].startswith("noise")
    widget.undo.native.click()
    assert np.asarray(layer.data) is original and "dfpir" not in layer.metadata
    assert not said


def test_commands_of_the_palette(qtbot, small, said, make_napari_viewer_proxy):
    viewer = make_napari_viewer_proxy()
    noise = np.random.default_rng(0).normal(120, 30, (48, 64)).clip(0, 255).astype(np.uint8)
    layers = [viewer.add_layer(Image(noise.copy(), name=name)) for name in ("a", "b")]
    before = [np.asarray(layer.data) for layer in layers]
    command("diagnose")
    widget = only_widget(viewer)
    wait(qtbot, widget)
    assert widget.layer.value == layers[1] and widget._found.text()
    widget.degradation.value = "noise-25"
    viewer.layers.selection.select_only(layers[0])
    viewer.layers.selection.add(layers[1])
    command("restore_selected_layers")
    wait(qtbot, widget)
    assert [len(layer.metadata["dfpir"]) for layer in layers] == [1, 1]
    for layer, data in zip(layers, before, strict=True):
        viewer.layers.selection.active = layer
        command("undo_restoration")
        assert np.asarray(layer.data) is data
    command("undo_restoration")
    assert "nothing to undo" in said[-1] and only_widget(viewer) is widget


def test_palette_without_an_image_says_so(said, make_napari_viewer_proxy):
    viewer = make_napari_viewer_proxy()
    viewer.add_points([[1, 2]])
    for name in ("diagnose", "restore_selected_layers", "undo_restoration"):
        command(name)
        assert "image" in said[-1] or "nothing to undo" in said[-1]
    assert len(said) == 3


def test_preferences_are_read(request):
    if not hasattr(napari.settings, "get_plugin_settings"):
        assert read_settings() == Settings()
        pytest.skip("plugins have settings from napari 0.9 on")
    npe2pm = request.getfixturevalue("npe2pm")
    request.getfixturevalue("plugin_settings")
    get_plugin_settings = napari.settings.get_plugin_settings

    if "dfpir" not in npe2pm:
        npe2pm.register(PluginManifest.from_distribution("dfpir"))
    assert read_settings() == Settings()
    get_plugin_settings("dfpir").restoration.preview_side = 128
    assert read_settings() == Settings(preview_side=128)
    with pytest.raises(ValueError, match="greater than or equal to 64"):
        get_plugin_settings("dfpir").restoration.preview_side = 3
